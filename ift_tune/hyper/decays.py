"""Decays: squared weights or their absolute values, each with a strength that is learned."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, require_number
from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.layout import Exclude, Per
from ift_tune.hyper.separable import Separable, SeparablePenalty
from ift_tune.hyper.transforms import Init
from ift_tune.implicit.vectors import Tensors


class WeightDecay(Separable):
    """Σᵢ c(λᵢ)·wᵢ² over the model's trainable parameters, c = softplus or exp.

    The gradient by a weight is 2c·w: with SGD, a decay c here is `weight_decay=2c` there.

    Example:
        >>> import torch, ift_tune
        >>> model = torch.nn.Linear(4, 3)
        >>> [ift_tune.WeightDecay(model, per).count for per in ("model", "tensor", "weight")]
        [1, 2, 15]
        >>> ift_tune.WeightDecay(torch.nn.Sequential(model, model), "module").count
        1
        >>> decay = ift_tune.WeightDecay(model, "channel", init=0.25)
        >>> squares = sum(w.square().sum() for w in model.parameters())
        >>> torch.allclose(decay(), 0.25 * squares)
        True
        >>> ift_tune.WeightDecay(model, "input", exclude="bias").count  # one for each feature
        4
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


class L1Decay(Separable):
    """Σᵢ c(λᵢ)·(√(wᵢ² + ε²) − ε) over the model's trainable parameters, c = softplus or exp.

    The implicit function theorem differentiates ∂L_T/∂w once more by w, and |w| has no second
    derivative at 0, just where an L1 penalty puts the weights: there a true |w| would hide that
    the weight answers to λ at all. So |w| is smoothed over a width ε: for |w| ≫ ε the slope is ±1
    and the curvature vanishes; for |w| ≪ ε it is a decay of w²/(2ε). Weights are thus drawn to
    well within ε of zero, not exactly to it.

    The curvature at 0 is c/ε: a small ε makes the Hessian stiff, so that the Neumann series takes
    smaller steps (automatic α sees to it), and plain gradient descent needs an inner learning rate
    below 2ε/c.

    Example:
        >>> import torch, ift_tune
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> round(float(ift_tune.L1Decay(model, "model", init=0.5, epsilon=1e-6)().detach()), 3)
        3.0
    """

    name: ClassVar[str] = "l1_decay"

    def __init__(
        self,
        model: nn.Module,
        per: Per = "weight",
        *,
        init: Init = 1e-3,
        transform: Literal["softplus", "exp"] = "softplus",
        epsilon: float = 1e-3,
        exclude: Exclude = (),
    ) -> None:
        """Make the raw parameters λ.

        Args:
            model: As for `WeightDecay`, and so are `per`, `init`, `transform` and `exclude`.
            per: What has one λ.
            init: The decay to start from.
            transform: c.
            epsilon: ε, in the units of the weights, above 0.
            exclude: Parameters that are left alone.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__(model, per, init=init, transform=transform, exclude=exclude)
        require_number("epsilon", epsilon, least=0.0)
        if epsilon == 0.0:
            raise UsageError(
                f"epsilon must be a width above 0, got {epsilon!r}: without smoothing |w| has no "
                "second derivative at 0"
            )
        self.epsilon = float(epsilon)

    def penalty(self) -> L1Penalty:
        """Return the penalty in closed form at the present λ."""
        return L1Penalty(self, self.epsilon)

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a decay for every weight of `model`, smooth at the scale of its weights."""
        return cls(model, "weight", init=0.05, epsilon=0.3)


class L1Penalty(SeparablePenalty):
    """r = Σ c·g(w) with g = ρ − ε, g′ = w/ρ and g″ = ε²/ρ³, where ρ = √(w² + ε²)."""

    def __init__(self, kind: L1Decay, epsilon: float) -> None:
        """Compute the strengths once."""
        super().__init__(kind)
        self._epsilon = epsilon

    def term(self, weight: Tensor) -> Tensor:
        """Return w²/(ρ + ε), which is ρ − ε without the cancellation for small w."""
        square = weight.square()
        return square / ((square + self._epsilon**2).sqrt() + self._epsilon)

    def slope(self, weights: Tensors) -> list[Tensor]:
        """Return w/ρ."""
        return list(torch._foreach_div(list(weights), self._radius(weights)))

    def bend(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return ε²·v/ρ³, as (ε/ρ)²·v/ρ so that a small ε does not underflow."""
        radius = self._radius(weights)
        found = torch._foreach_div(list(vector), radius)
        torch._foreach_reciprocal_(radius)
        torch._foreach_mul_(radius, self._epsilon)
        torch._foreach_mul_(found, radius)
        torch._foreach_mul_(found, radius)
        return list(found)

    def _radius(self, weights: Tensors) -> list[Tensor]:
        """Return ρ, in new tensors."""
        radius = list(torch._foreach_mul(list(weights), list(weights)))
        torch._foreach_add_(radius, self._epsilon**2)
        torch._foreach_sqrt_(radius)
        return radius
