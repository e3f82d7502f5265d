"""Penalties that are a sum over the weights, each with a strength that is learned."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.views import View
from ift_tune.hyper.arguments import require_model
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.layout import Exclude, Layout, Per, StackedLayout
from ift_tune.hyper.pictures import quantiles, strength_views
from ift_tune.hyper.transforms import Init, get_transform, initialise
from ift_tune.implicit.penalty import Penalty, aligned_to
from ift_tune.implicit.vectors import Tensors, flatten, mul, runs

_LEAST, _MOST = 1e-6, 1.0
_MOST_FACTORS = 12  # beyond that many tensors, their factors would drown the one strength
_BOUNDS = "a decay above 0"


class Separable(HyperKind):
    """Σᵢ c(λᵢ)·f(wᵢ) over the model's trainable parameters, c = softplus or exp.

    Calling the kind returns the penalty as a scalar for a hand-written training loss; a
    `BilevelProblem` returns `kind.penalty()` instead, which costs next to nothing in the inner
    loop.
    """

    def __init__(
        self,
        model: nn.Module,
        per: Per = "weight",
        *,
        init: Init = 1e-3,
        transform: Literal["softplus", "exp"] = "softplus",
        exclude: Exclude = (),
    ) -> None:
        """Make the raw parameters λ, on the device and of the dtype of the weights.

        Args:
            model: Its trainable parameters are decayed: a whole model, or a part of it. It is not
                registered as a submodule.
            per: One λ for the ``"model"``, one per ``"tensor"``, one per output ``"channel"`` of
                every tensor (its first dimension, so one per entry of a bias), one per ``"input"``
                (its second dimension: in a first layer, a decay for each feature), or one per
                ``"weight"``. One per ``"module"`` for the tensors of each layer together, as for
                the factors A and B of each LoRA layer. `Per` says more, of transposed convolutions
                and of groups.
            init: The decay to start from, above 0; or a function that fills the raw λ in place.
            transform: c: ``"softplus"`` moves small decays slowly, ``"exp"`` moves all by factors.
            exclude: Parameters without a decay, such as ``["bias", "norm"]``; see `Exclude`.

        Raises:
            UsageError: If `per`, `init` or `transform` is not one of these, or `exclude` names
                what is not there.
        """
        super().__init__()
        require_model(model)
        self.layout = Layout(model, per, exclude)
        self.transform = get_transform(transform, ("softplus", "exp"))
        raws = self.layout.empty()
        for raw in raws:
            initialise(raw, init, self.transform.inverse, _BOUNDS)
        self.raw = nn.ParameterList(nn.Parameter(raw) for raw in raws)

    @property
    def per(self) -> Per:
        """What has one λ."""
        return self.layout.per

    @property
    def made_of(self) -> nn.Module:
        """The model, or the part of one, that is decayed."""
        return self.layout.model

    def _values(self) -> list[Tensor]:
        return [self.transform.forward(raw) for raw in self.raw]

    def decays(self) -> list[Tensor]:
        """Return c(λ): one tensor per parameter tensor of the model, which broadcasts to it."""
        return self.layout.expand(self._values())

    @abc.abstractmethod
    def penalty(self) -> Penalty:
        """Return the penalty in closed form at the present λ."""

    def forward(self) -> Tensor:
        """Return the penalty at the model's present weights, with its graph."""
        return self.penalty().value(self.layout.weights())

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return a decay for all, and factors of it for the tensors of a small model."""
        with torch.no_grad():
            # The geometric mean: decays are as far apart as their logarithms.
            mean = float(flatten(self._values()).log().mean().exp())
        found = {"decay": CoarseParameter.near(_LEAST, _MOST, mean)}
        if self.per != "model" and len(self.raw) <= _MOST_FACTORS:
            found |= {
                f"factor.{name}": CoarseParameter(0.1, 10.0, 1.0, secondary=True)
                for name in self.layout.names()
            }
        return found

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Give every weight the decay, times the factor of its tensor."""
        for raw, name in zip(self.raw, self.layout.names(), strict=True):
            value = values["decay"] * values.get(f"factor.{name}", 1.0)
            initialise(raw, value, self.transform.inverse, _BOUNDS)

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return quantiles of the decays."""
        return quantiles(flatten(self._values()))

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the decays of each tensor of weights, of a shape that broadcasts to it."""
        return dict(zip(self.layout.names(), self._values(), strict=True))

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the decays are distributed, by layer, and maps of them; none for one decay."""
        if self.per == "model":
            return []
        values = self.layout.outputs_first(self._values())
        return strength_views("decays", dict(zip(self.layout.names(), values, strict=True)))


class SeparablePenalty(Penalty):
    """r = Σ s·g(w) with s = factor·c(λ), so that all derivatives are elementwise.

    ∂r/∂w = s·g′(w); ∂²r/∂w∂wᵀ = diag(s·g″(w)); vᵀ·∂²r/∂w∂λ = factor·v·g′(w)·c′(λ), summed over the
    weights that share a λ. A subclass gives g, which may be scaled by `factor` to make g′ and g″
    cheap: the inner loop calls `slope` at every step.
    """

    factor: ClassVar[float] = 1.0

    def __init__(self, kind: Separable) -> None:
        """Compute s once."""
        self._kind = kind
        self._layout: Layout | StackedLayout = kind.layout
        self.hypers = list(kind.raw)
        # λ stays until the next outer step, so a softplus over a million decays is taken once, and
        # an inner step costs one fused multiply-add, without a graph to λ.
        with torch.no_grad():
            self._strengths = kind.decays()
            if self.factor != 1.0:
                for part in runs(self._strengths):
                    self._strengths[part] = torch._foreach_mul(self._strengths[part], self.factor)

    def aligned(self, weights: Tensors) -> Penalty:
        """Return the penalty as one over `weights`: those of the kind are found among them."""
        return aligned_to(self, self._kind.layout.weights(), weights)

    def stacked(self, hypers: Tensors) -> Penalty | None:
        """Return the penalties of several problems: all that is elementwise stays as it is."""
        twin = copy.copy(self)
        layout = StackedLayout(self._kind.layout)
        twin._layout, twin.hypers = layout, list(hypers)
        with torch.no_grad():
            values = [self._kind.transform.forward(raw) for raw in hypers]
            twin._strengths = twin._scaled(layout.expand(values))
        return twin

    @abc.abstractmethod
    def term(self, weight: Tensor) -> Tensor:
        """Return g(w) elementwise, with its graph."""

    @abc.abstractmethod
    def slope(self, weights: Tensors) -> list[Tensor]:
        """Return g′(w)."""

    @abc.abstractmethod
    def bend(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return g″(w)·v."""

    def _scaled(self, values: Tensors) -> list[Tensor]:
        return list(values) if self.factor == 1.0 else mul(values, self.factor)

    def value(self, weights: Tensors) -> Tensor:
        """Return r with its graph to the weights and to λ."""
        pairs = zip(self._scaled(self._kind.decays()), weights, strict=True)
        return torch.stack([(s * self.term(w)).sum() for s, w in pairs]).sum()

    @torch.no_grad()
    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add s·g′(w) in place."""
        torch._foreach_addcmul_(list(gradient), self._strengths, self.slope(weights))

    @torch.no_grad()
    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return s·g″(w)·v."""
        return list(torch._foreach_mul(self._strengths, self.bend(weights, vector)))

    @torch.no_grad()
    def add_hvp_(self, products: Tensors, weights: Tensors, vector: Tensors) -> None:
        """Add s·g″(w)·v in place."""
        torch._foreach_addcmul_(list(products), self._strengths, self.bend(weights, vector))

    @torch.no_grad()
    def with_hvp(self, products: Tensors, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return `products` with c·g″(w)·v added in the same pass over memory."""
        bent = self.bend(weights, vector)
        return list(torch._foreach_addcmul(list(products), self._strengths, bent))

    @torch.no_grad()
    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return factor·v·g′(w)·c′(λ), summed over the weights that share a λ."""
        kind = self._kind
        products = self._layout.reduce(torch._foreach_mul(self.slope(weights), list(vector)))
        for part in runs(products):
            slopes = [kind.transform.derivative(raw) for raw in self.hypers[part]]
            # Weights and λ may be of two types: the product is of the wider one.
            products[part] = torch._foreach_mul(products[part], slopes)
        if self.factor != 1.0:
            torch._foreach_mul_(products, self.factor)
        return products
