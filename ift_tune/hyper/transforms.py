"""Maps from an unconstrained parameter λ to the value a hyperparameter is allowed to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.errors import UsageError, nearest


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
