"""Penalties that are a sum over the weights, each with a strength that is learned."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, nearest
from ift_tune.base.views import View
from ift_tune.hyper.adapter_layers import label_of
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.pictures import quantiles, strength_views
from ift_tune.hyper.transforms import Init, get_transform, initialise
from ift_tune.implicit.penalty import Penalty, aligned_to
from ift_tune.implicit.vectors import Tensors, flatten, mul, named, runs

Per: TypeAlias = Literal["model", "module", "tensor", "channel", "input", "weight"]
"""What has one λ: the whole model, each module (a layer's tensors, all those of a LoRA layer's
adapter), each parameter tensor, each output channel of each tensor (its first dimension; of a bias
and of a normalisation's scale every entry is a channel), each input of each tensor (its second
dimension; a bias has one λ), or each weight."""

Exclude: TypeAlias = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""Parameters without a decay: by the last part of their name (``"bias"``), ``"norm"`` for those of
normalisation layers, a name, a module's name or a pattern (``"layers.*.weight"``); or a function
``exclude(name, parameter)``."""

_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation alike
    nn.GroupNorm,
    nn.LayerNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


_SHARED, _WHOLE = ("model", "module"), "the model"


class Layout:
    """The map between hyperparameters and the model's trainable tensors, in their order.

    λ has one tensor for each of the model's, of a shape that broadcasts to it: (), (C, 1, ..., 1)
    or its own. Where the tensors of a module, or of the whole model, share one λ, it is a tensor of
    shape () for each module, or one.
    """

    def __init__(self, model: nn.Module, per: Per, exclude: Exclude = ()) -> None:
        """Remember the model, as a plain attribute: its weights are no hyperparameters.

        Raises:
            UsageError: If `per` is none of `Per`, the model has nothing to train, or `exclude`
                names what is not there or leaves nothing.
        """
        if per not in get_args(Per):
            raise UsageError(f"per must be one of {', '.join(get_args(Per))}, got {per!r}")
        self.per = per
        self._model = model
        self._excluded = excluded_names(model, exclude)
        self._tensors = len(self._named())

    def _named(self) -> dict[str, Tensor]:
        every = named(self._model, "the model")
        return {name: w for name, w in every.items() if name not in self._excluded}

    def weights(self) -> list[Tensor]:
        """Return what are the model's parameters now, also inside `torch.func.functional_call`.

        Raises:
            UsageError: If there are more or fewer tensors than there were.
        """
        weights = list(self._named().values())
        if self.per != "model" and len(weights) != self._tensors:
            raise UsageError(
                f"the model has {len(weights)} trainable tensors and had {self._tensors} when its "
                "decay was made: make it after freezing or adding layers"
            )
        return weights

    def names(self) -> list[str]:
        """Return what each tensor of λ belongs to: a parameter's name, or the model."""
        return list(dict.fromkeys(self._owners()))

    def _owners(self) -> list[str]:
        """Return what has the λ of each tensor of weights."""
        names = list(self._named())
        if self.per == "model":
            return [_WHOLE] * len(names)
        return [_module_of(name) for name in names] if self.per == "module" else names

    def places(self) -> list[int]:
        """Return the number of the λ of each tensor of weights."""
        known: dict[str, int] = {}
        return [known.setdefault(owner, len(known)) for owner in self._owners()]

    def empty(self) -> list[Tensor]:
        """Return tensors for λ, not filled, on the device and of the dtype of the weights."""
        first: dict[str, Tensor] = {}
        for owner, weight in zip(self._owners(), self.weights(), strict=True):
            first.setdefault(owner, weight)
        return [weight.new_empty(self._shape(weight)) for weight in first.values()]

    def expand(self, values: Tensors) -> list[Tensor]:
        """Return λ, or a function of it, for each tensor of weights, to which it broadcasts."""
        self.weights()  # which refuses a model a layer of which was frozen since
        return [values[i] for i in self.places()] if self.per in _SHARED else list(values)

    def reduce(self, products: Tensors) -> list[Tensor]:
        """Return the sums over the weights that share a λ: the adjoint of `expand`."""
        if self.per == "weight":
            return list(products)
        sums = [product.sum_to_size(self._shape(product)) for product in products]
        return summed_by(self.places(), sums) if self.per in _SHARED else sums

    def _shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of the λ of one tensor of weights."""
        if self.per == "weight":
            return tuple(weight.shape)
        if self.per == "channel":
            return (*weight.shape[:1], *(1 for _ in weight.shape[1:]))
        if self.per == "input" and weight.ndim > 1:
            return (1, weight.shape[1], *(1 for _ in weight.shape[2:]))
        return ()


class _StackedLayout:
    """The same map for several models at once: all tensors have one dimension more, the first."""

    def __init__(self, layout: Layout) -> None:
        """Take the map of one of them."""
        self._places = layout.places()
        weights = layout.weights()
        self._shapes = [(tuple(w.shape), layout._shape(w)) for w in weights]

    def expand(self, values: Tensors) -> list[Tensor]:
        """Return λ, or a function of it, for each tensor of weights, to which it broadcasts."""
        each = [values[i] for i in self._places]
        # Aligned from the right, behind the models' dimension.
        return [
            v.reshape(len(v), *([1] * (len(w) - len(own))), *own)
            for v, (w, own) in zip(each, self._shapes, strict=True)
        ]

    def reduce(self, products: Tensors) -> list[Tensor]:
        """Return the sums over the weights that share a λ: the adjoint of `expand`."""
        sums = []
        for product, (w, own) in zip(products, self._shapes, strict=True):
            lead = [1] * (len(w) - len(own))
            sums.append(
                product.sum_to_size((len(product), *lead, *own)).reshape(len(product), *own)
            )
        return sums if len(set(self._places)) == len(sums) else summed_by(self._places, sums)


def summed_by(places: Sequence[int], values: Tensors) -> list[Tensor]:
    """Return the sums of the values that have one place, in the order of the places."""
    return [
        torch.stack([v for v, at in zip(values, places, strict=True) if at == place]).sum(dim=0)
        for place in range(max(places) + 1)
    ]


def _module_of(name: str) -> str:
    """Return the name of the module that a parameter is part of: of an adapter, the LoRA layer."""
    layer, inside, _ = name.partition("lora_")
    owner = layer.rstrip(".") if inside else name.rpartition(".")[0]
    return label_of(owner) or _WHOLE


def excluded_names(model: nn.Module, exclude: Exclude) -> frozenset[str]:
    """Return the names of the trainable parameters that `exclude` means.

    Raises:
        UsageError: If an entry matches nothing, or nothing would be left.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if callable(exclude):
        found = {name for name, parameter in trained.items() if exclude(name, parameter)}
    else:
        found = set()
        for entry in [exclude] if isinstance(exclude, str) else exclude:
            matched = {name for name in trained if _matches(entry, name, model)}
            if not matched:
                raise UsageError(
                    f"exclude: {entry!r} is no parameter of the model{nearest(entry, trained)}; "
                    "give 'bias', 'norm', a name, a module's name or a pattern"
                )
            found |= matched
    if trained and len(found) == len(trained):
        raise UsageError(f"exclude leaves no parameter of the {len(trained)} that are trained")
    return frozenset(found)


def _matches(entry: str, name: str, model: nn.Module) -> bool:
    owner, _, last = name.rpartition(".")
    if entry == "norm" and isinstance(model.get_submodule(owner), _NORMALISATIONS):
        return True
    return entry in (name, last) or name.startswith(f"{entry}.") or fnmatchcase(name, entry)


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
                the factors A and B of each LoRA layer.
            init: The decay to start from, above 0; or a function that fills the raw λ in place.
            transform: c: ``"softplus"`` moves small decays slowly, ``"exp"`` moves all by factors.
            exclude: Parameters without a decay, such as ``["bias", "norm"]``; see `Exclude`.

        Raises:
            UsageError: If `per`, `init` or `transform` is not one of these, or `exclude` names
                what is not there.
        """
        super().__init__()
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
        return strength_views("decays", dict(zip(self.layout.names(), self._values(), strict=True)))


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
        self._layout: Layout | _StackedLayout = kind.layout
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
        layout = _StackedLayout(self._kind.layout)
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
