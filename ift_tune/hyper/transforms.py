"""Maps from λ to the value it is allowed to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, nearest

Init: TypeAlias = float | Sequence[float] | Tensor | Callable[[Tensor], object]
"""Where λ starts: the value after the transform, or one for each entry; or a function that fills
the raw tensor in place (``functools.partial(nn.init.uniform_, a=0, b=1)``)."""


@dataclass(frozen=True)
class Transform:
    """A smooth increasing map with its derivative and its inverse, all elementwise."""

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _inverse_softplus(value: Tensor) -> Tensor:
    """Return log(eᵛ − 1), written so that large values do not overflow."""
    return value + torch.log(-torch.expm1(-value))


TRANSFORMS = {
    "softplus": Transform(F.softplus, torch.sigmoid, _inverse_softplus),
    "exp": Transform(torch.exp, torch.exp, torch.log),
    "sigmoid": Transform(torch.sigmoid, lambda x: x.sigmoid() * (1.0 - x.sigmoid()), torch.logit),
    "tanh": Transform(torch.tanh, lambda x: 1.0 - x.tanh().square(), torch.atanh),
    "none": Transform(lambda x: x, torch.ones_like, lambda x: x),
}
"""Softplus and exp give positive numbers, sigmoid numbers in (0, 1), tanh in (−1, 1)."""


def get_transform(name: str, allowed: tuple[str, ...]) -> Transform:
    """Return a transform by name.

    Raises:
        UsageError: If it is not one of `allowed`.
    """
    if name not in allowed:
        raise UsageError(f"unknown transform {name!r}{nearest(name, allowed)}")
    return TRANSFORMS[name]


@torch.no_grad()
def initialise(raw: Tensor, init: Init, inverse: Callable[[Tensor], Tensor], bounds: str) -> None:
    """Fill `raw` so that its transform has the value, or the values, `init`; or by the function.

    Args:
        raw: λ, filled in place.
        init: The value after the transform, or one for each entry of `raw`; or a function.
        inverse: Of the transform.
        bounds: What `init` must be, for the error: the end of "init must be ...".

    Raises:
        UsageError: If the value has no finite inverse under the transform.
    """
    if callable(init):
        init(raw)
        return
    # In float64, whatever λ has: in float32 a rate of 1 − 1e-8 would be 1, and its λ infinite.
    try:
        values = torch.as_tensor(init, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"init must be {bounds}, got {shown(init)}") from error
    if values.ndim and values.shape != raw.shape:
        raise UsageError(
            f"init must be {bounds}, or one for each of {tuple(raw.shape)}, got shape "
            f"{tuple(values.shape)}"
        )
    raw.copy_(inverse(values).expand(raw.shape))
    if not bool(torch.isfinite(raw).all()):
        raise UsageError(f"init must be {bounds}, got {shown(init)}")
