"""A weight for each position of a sequence, or of a map, in the training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.views import View
from ift_tune.hyper.arguments import new_raw, whole_number
from ift_tune.hyper.base import CoarseParameter, Criterion, HyperKind
from ift_tune.hyper.pictures import heat_map, quantiles
from ift_tune.hyper.transforms import Init, get_transform, initialise

_FEW = 12  # positions that are named one by one


class PositionWeights(HyperKind):
    """The loss at position t of each example is multiplied by c(λ_t), c = softplus or exp.

    For losses with an entry for each answer, (B, T) of tokens or (B, H, W) of pixels. The loss of
    an example stays the mean over its answers. A weight for each *token* is that of its class:
    `ClassWeights`.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.PositionWeights(3)
        >>> kind.set_coarse({"position_0": 0.5, "position_1": 1.0, "position_2": 2.0})
        >>> losses = kind.criterion(torch.nn.CrossEntropyLoss(reduction="none"))
        >>> found = losses(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]])).detach()
        >>> (found / found[0, 1]).round(decimals=3)
        tensor([[0.5000, 1.0000, 2.0000]])
    """

    name: ClassVar[str] = "position_weights"

    def __init__(
        self,
        *shape: int | Sequence[int],
        init: Init = 1.0,
        transform: Literal["softplus", "exp"] = "softplus",
        like: Tensor | None = None,
    ) -> None:
        """Make one raw parameter per position.

        Args:
            shape: Of one example's losses: T, or H and W, or ``(H, W)``; nothing where an example
                has one loss.
            init: The weight to start from, above 0; or a function that fills the raw λ in place.
            transform: c: ``"softplus"`` moves large weights evenly, ``"exp"`` moves all by factors.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        sizes = tuple(whole_number("positions", n) for n in given)
        self.transform = get_transform(transform, ("softplus", "exp"))
        raw = new_raw(sizes, like)
        initialise(raw, init, self.transform.inverse, "a weight above 0")
        self.raw = nn.Parameter(raw)

    def forward(self) -> Tensor:
        """Return the weights of the positions, of the shape of one example's losses."""
        return self.transform.forward(self.raw)

    def criterion(self, loss: Criterion) -> Criterion:
        """Return the loss, weighted."""

        def weighted(logits: Tensor, targets: Tensor) -> Tensor:
            losses = loss(logits, targets)
            # Broadcast, weights of another shape would make more losses than there are answers.
            if losses.shape[1:] != self.raw.shape:
                raise UsageError(
                    f"made for losses of shape {('B', *self.raw.shape)}, got "
                    f"{tuple(losses.shape)}: give the positions of one example, "
                    f"PositionWeights{tuple(losses.shape[1:])}"
                )
            weights: Tensor = self()
            return losses * weights

        return weighted

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the weights of a few positions; none if there are many."""
        if self.raw.numel() > _FEW:
            return {}
        return {name: CoarseParameter.near(0.1, 10.0, w) for name, w in self.summary().items()}

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Give every position its weight."""
        if values:
            for name, raw in zip(self._names(), self.raw.view(-1), strict=True):
                initialise(raw, values[name], self.transform.inverse, "a weight above 0")

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the weight of each position."""
        return {"weights": self()}

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return the weights, or quantiles of many."""
        weights = self()
        if weights.numel() > _FEW:
            return quantiles(weights)
        return dict(zip(self._names(), weights.flatten().tolist(), strict=True))

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return a map of many weights; a few are in the summary."""
        if self.raw.numel() <= _FEW:
            return []
        weights = self()
        rows = weights.view(-1, weights.shape[-1]).cpu()
        axes = ("", "position") if weights.ndim < 2 else ("row", "column")
        return [heat_map("weights of the positions", rows, *axes)]

    def _names(self) -> list[str]:
        return [f"position_{k}" for k in range(math.prod(self.raw.shape))]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a weight for each of the losses that the model has for an example."""
        with torch.no_grad():
            outputs = model(inputs)
        return cls(*outputs.shape[2:], init=0.8, like=outputs)
