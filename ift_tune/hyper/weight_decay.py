"""A decay for the whole model, for each tensor, or for every single weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.errors import UsageError
from ift_tune.hyper.base import HyperKind, Init, initialise, quantiles
from ift_tune.hyper.knobs import Knob
from ift_tune.hyper.transforms import get_transform
from ift_tune.penalty import Penalty
from ift_tune.types import Tensors
from ift_tune.vectors import flatten, mul, named

_LEAST_DECAY, _MOST_DECAY = 1e-6, 1.0
_MOST_FACTORS = 12  # beyond that many tensors, their factors would drown the one decay


class WeightDecay(HyperKind):
    """Σᵢ c(λᵢ)·wᵢ² over the model's trainable parameters, c = softplus or exp.

    The gradient by a weight is 2c·w: with SGD, a decay c here is `weight_decay=2c` there.
    ``decay()`` returns the penalty as a scalar for a hand-written training loss; a
    `BilevelProblem` returns `decay.penalty()` instead, which costs nothing in the inner loop.
    """

    name: ClassVar[str] = "weight_decay"

    def __init__(
        self,
        model: nn.Module,
        per: Literal["model", "tensor", "weight"] = "weight",
        *,
        init: Init = 1e-3,
        transform: Literal["softplus", "exp"] = "softplus",
    ) -> None:
        """Make the raw parameters λ, on the device and of the dtype of the weights.

        Args:
            model: Its trainable parameters are decayed. It is not registered as a submodule.
            per: One λ for the ``"model"``, one per ``"tensor"``, or one per ``"weight"``.
            init: The decay to start from, above 0; or a function that fills the raw λ in place.
            transform: c: ``"softplus"`` moves small decays slowly, ``"exp"`` moves all by factors.

        Raises:
            UsageError: If `per`, `init` or `transform` is not one of these.
        """
        super().__init__()
        if per not in ("model", "tensor", "weight"):
            raise UsageError(f"per must be 'model', 'tensor' or 'weight', got {per!r}")
        self.per = per
        self.transform = get_transform(transform, ("softplus", "exp"))
        # In a list, where nn.Module does not register the model's weights as hyperparameters.
        self._model = [model]
        weights = list(named(model, "the model").values())
        first = weights[0]
        if per == "model":
            raws = [torch.empty((), dtype=first.dtype, device=first.device)]
        else:
            raws = [
                torch.empty(w.shape if per == "weight" else (), dtype=w.dtype, device=w.device)
                for w in weights
            ]
        for raw in raws:
            initialise(raw, init, self.transform.inverse, "a decay above 0")
        self.raw = nn.ParameterList(nn.Parameter(raw) for raw in raws)

    def _weights(self) -> list[Tensor]:
        """Return what are the model's parameters now, also inside `torch.func.functional_call`."""
        weights = list(named(self._model[0], "the model").values())
        if self.per != "model" and len(weights) != len(self.raw):
            raise UsageError(
                f"the model has {len(weights)} trainable tensors and had {len(self.raw)} when its "
                "decay was made: make the WeightDecay after freezing or adding layers"
            )
        return weights

    def decays(self) -> list[Tensor]:
        """Return c(λ): one tensor per parameter tensor of the model, of its shape or scalar."""
        values = [self.transform.forward(raw) for raw in self.raw]
        weights = self._weights()
        return values * len(weights) if self.per == "model" else values

    def forward(self) -> Tensor:
        """Return the penalty at the model's present weights, with its graph."""
        return self.penalty().value(self._weights())

    def penalty(self) -> Penalty:
        """Return the penalty in closed form at the present λ."""
        return DecayPenalty(self)

    def knobs(self) -> dict[str, Knob]:
        """Return a decay for all, and factors of it for the tensors of a small model."""
        with torch.no_grad():
            values = flatten([self.transform.forward(raw) for raw in self.raw])
            mean = float(values.log().mean().exp())
        start = min(max(mean, _LEAST_DECAY), _MOST_DECAY)
        found = {"decay": Knob(_LEAST_DECAY, _MOST_DECAY, start)}
        if self.per != "model" and len(self.raw) <= _MOST_FACTORS:
            names = named(self._model[0], "the model")
            found |= {f"factor.{name}": Knob(0.1, 10.0, 1.0, refines=True) for name in names}
        return found

    @torch.no_grad()
    def turn(self, values: Mapping[str, float]) -> None:
        """Give every weight the decay, times the factor of its tensor."""
        names = named(self._model[0], "the model") if self.per != "model" else ["the model"]
        for raw, name in zip(self.raw, names, strict=True):
            value = values["decay"] * values.get(f"factor.{name}", 1.0)
            initialise(raw, value, self.transform.inverse, "a decay above 0")

    def summary(self) -> dict[str, float]:
        """Return quantiles of the decays."""
        return quantiles(flatten([self.transform.forward(raw) for raw in self.raw]))

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a decay for every weight of `model`."""
        return cls(model, "weight", init=0.1)


class DecayPenalty(Penalty):
    """r = Σ c·w²; ∂r/∂w = 2c·w; ∂²r/∂w∂wᵀ = diag(2c); vᵀ·∂²r/∂w∂λ = 2·w·v·c′(λ)."""

    def __init__(self, decay: WeightDecay) -> None:
        """Compute 2c once."""
        self._decay = decay
        self.hypers = list(decay.raw)
        with torch.no_grad():
            self._doubled = mul(decay.decays(), 2.0)

    def value(self, weights: Tensors) -> Tensor:
        """Return Σ c·w² with its graph to the weights and to λ."""
        pairs = zip(self._decay.decays(), weights, strict=True)
        return torch.stack([(c * w.square()).sum() for c, w in pairs]).sum()

    @torch.no_grad()
    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add 2c·w in place."""
        torch._foreach_addcmul_(list(gradient), self._doubled, list(weights))

    @torch.no_grad()
    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return 2c·v."""
        return list(torch._foreach_mul(self._doubled, list(vector)))

    @torch.no_grad()
    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return 2·w·v·c′(λ), summed over the weights that share a λ."""
        products = list(torch._foreach_mul(list(weights), list(vector)))
        if self._decay.per != "weight":
            products = [product.sum() for product in products]
        if self._decay.per == "model":
            products = [torch.stack(products).sum()]
        slopes = [self._decay.transform.derivative(raw) for raw in self.hypers]
        return mul(torch._foreach_mul(products, slopes), 2.0)
