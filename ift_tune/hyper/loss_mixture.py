"""A training loss that is mixed from several, by learned coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError, nearest
from ift_tune.hyper.arguments import new_raw
from ift_tune.hyper.base import CoarseParameter, Criterion, HyperKind
from ift_tune.hyper.class_targets import ClassTargets
from ift_tune.hyper.named_state import NamedState
from ift_tune.hyper.transforms import TRANSFORMS, Init, initialise

WRAPPED = "cross_entropy"
_FOCUS = 2.0  # the exponent that Lin et al. recommend
_BOUNDS = "a coefficient above 0"

Term: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``term(log_probabilities, targets)``: both (B, C, ...), the targets as probabilities; the losses
(B, ...). At least 0, and twice differentiable."""


def _brier(logs: Tensor, targets: Tensor) -> Tensor:
    """Return Σ_k (π_k − p_k)² (Brier 1950)."""
    return (logs.exp() - targets).square().sum(dim=1)


def _focal(logs: Tensor, targets: Tensor) -> Tensor:
    """Return −Σ_k p_k·(1 − π_k)²·log π_k (Lin et al. 2017): easy examples count for little."""
    # 1 − π = −expm1(log π), without the cancellation where π is near 1.
    return -(targets * (-torch.expm1(logs)).pow(_FOCUS) * logs).sum(dim=1)


def _absolute(logs: Tensor, targets: Tensor) -> Tensor:
    """Return Σ_k p_k·(1 − π_k), half the mean absolute error: robust to wrong labels.

    Ghosh, Kumar and Sastry 2017.
    """
    return -(targets * torch.expm1(logs)).sum(dim=1)


def _confidence(logs: Tensor, _targets: Tensor) -> Tensor:
    """Return log C − H(π), the divergence from the uniform distribution (Pereyra et al. 2017)."""
    return math.log(logs.shape[1]) + (logs.exp() * logs).sum(dim=1)


TERMS: dict[str, Term] = {
    "brier": _brier,
    "focal": _focal,
    "absolute": _absolute,
    "confidence": _confidence,
}
"""What can be mixed in beside the wrapped loss."""


class LossMixture(NamedState, HyperKind):
    """ℓ = Σ_m c_m·ℓ_m with c = softplus(λ) > 0.

    ``"cross_entropy"`` stands for the loss that is wrapped: the cross-entropy, unless a kind
    before this one in a `Compose` has changed it. The others are those of `TERMS`, computed from
    the targets that this kind is given. The coefficients do not sum to 1: their common scale is
    what the data loss weighs beside a decay, and redundant where there is none.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.LossMixture(init={"cross_entropy": 1.0, "brier": 0.5})
        >>> losses = kind.criterion(torch.nn.CrossEntropyLoss(reduction="none"))
        >>> losses(torch.zeros(1, 2), torch.tensor([0])).detach()  # log 2 + 0.5·0.5
        tensor([0.9431])
    """

    name: ClassVar[str] = "loss_mixture"

    def __init__(
        self,
        losses: Sequence[str] = (WRAPPED, "brier"),
        *,
        init: Init | Mapping[str, float] = 1.0,
        like: Tensor | None = None,
    ) -> None:
        """Make one raw parameter per loss.

        Args:
            losses: ``"cross_entropy"``, ``"brier"``, ``"focal"``, ``"absolute"``,
                ``"confidence"``; each at most once.
            init: The coefficients to start from, above 0: one for all, or each by its name; or a
                function that fills the raw λ in place.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        known = (WRAPPED, *TERMS)
        names = (losses,) if isinstance(losses, str) else require_list("losses", losses, "names")
        self.losses = tuple(names)
        for name in self.losses:
            if name not in known:
                raise UsageError(f"there is no loss {name!r}{nearest(str(name), known)}")
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise UsageError(f"losses must be different names of {known}, got {self.losses}")
        self.transform = TRANSFORMS["softplus"]
        self.raw = nn.Parameter(new_raw(len(self.losses), like))
        self._targets = ClassTargets(
            type(self).__name__, instead="the losses of each label are mixed"
        )
        if isinstance(init, Mapping):
            if set(init) != set(self.losses):
                raise UsageError(f"init must have a value for each of {self.losses}, got {init}")
            self.set_coarse(init)
        else:
            initialise(self.raw, init, self.transform.inverse, _BOUNDS)

    def meaning(self) -> dict[str, list[Any]]:
        """Return the losses."""
        return {"losses": list(self.losses)}

    def forward(self) -> Tensor:
        """Return the coefficients, shape (losses,)."""
        return self.transform.forward(self.raw)

    def criterion(self, loss: Criterion) -> Criterion:
        """Return the mixture, with `loss` as its cross-entropy."""

        def mixed(logits: Tensor, targets: Tensor) -> Tensor:
            parts: list[Tensor] = []
            logs = F.log_softmax(logits, dim=1)  # once, for all terms
            for name in self.losses:
                if name == WRAPPED:
                    parts.append(loss(logits, targets))
                else:
                    known = self._targets.probabilities(logits, targets, self.raw)
                    parts.append(TERMS[name](logs, known))
            if any(part.shape != parts[0].shape for part in parts):
                raise UsageError(
                    f"{WRAPPED} must have a loss for each answer, as the other losses have, where "
                    "they are mixed: let the loss have no entry for each class, got shape "
                    f"{tuple(parts[self.losses.index(WRAPPED)].shape)}"
                )
            coefficients: Tensor = self()
            return torch.einsum("m,m...->...", coefficients, torch.stack(parts))

        return mixed

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the coefficients."""
        return {name: CoarseParameter.near(1e-3, 10.0, c) for name, c in self.summary().items()}

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Set every coefficient."""
        for raw, name in zip(self.raw, self.losses, strict=True):
            initialise(raw, values[name], self.transform.inverse, _BOUNDS)

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the coefficient of each loss."""
        return dict(zip(self.losses, self().unbind(), strict=True))

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return the coefficients by name."""
        return dict(zip(self.losses, self().tolist(), strict=True))

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a mixture of all losses."""
        return cls((WRAPPED, *TERMS), init=0.5, like=inputs)
