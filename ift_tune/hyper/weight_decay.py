"""A decay for the whole model, for each tensor, for each channel, or for every single weight."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.separable import Separable, SeparablePenalty
from ift_tune.implicit.vectors import Tensors


class WeightDecay(Separable):
    """Σᵢ c(λᵢ)·wᵢ² over the model's trainable parameters, c = softplus or exp.

    The gradient by a weight is 2c·w: with SGD, a decay c here is `weight_decay=2c` there.

    Example:
        >>> import torch, ift_tune
        >>> model = torch.nn.Linear(4, 3)
        >>> [ift_tune.WeightDecay(model, per).count for per in ("model", "tensor", "weight")]
        [1, 2, 15]
        >>> decay = ift_tune.WeightDecay(model, "channel", init=0.25)
        >>> squares = sum(w.square().sum() for w in model.parameters())
        >>> torch.allclose(decay(), 0.25 * squares)
        True
    """

    name: ClassVar[str] = "weight_decay"

    def penalty(self) -> DecayPenalty:
        """Return the penalty in closed form at the present λ."""
        return DecayPenalty(self)

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a decay for every weight of `model`."""
        return cls(model, "weight", init=0.1)


class DecayPenalty(SeparablePenalty):
    """r = Σ 2c·g(w) with g = w²/2, so that g′ = w and g″ = 1 cost nothing in the inner loop."""

    factor: ClassVar[float] = 2.0

    def term(self, weight: Tensor) -> Tensor:
        """Return w²/2."""
        return 0.5 * weight.square()

    def slope(self, weights: Tensors) -> list[Tensor]:
        """Return the weights themselves."""
        return list(weights)

    def bend(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the vector itself."""
        return list(vector)
