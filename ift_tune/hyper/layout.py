"""Which weights share one λ: the map between hyperparameters and the tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError, nearest
from ift_tune.hyper.adapter_layers import labels_of, owners_of
from ift_tune.implicit.vectors import Tensors, named

Per: TypeAlias = Literal["model", "module", "tensor", "channel", "input", "weight"]
"""What has one λ: the whole model, each module (a layer's tensors, all those of a LoRA layer's
adapter), each parameter tensor, each output channel of each tensor (its first dimension; of a bias
and of a normalisation's scale every entry is a channel), each input of each tensor (its second
dimension; a bias has one λ), or each weight.

Transposed convolutions and the `Conv1D` of transformers keep their weights the other way round, and
are taken so: their outputs are the second dimension. A transposed convolution with groups has no
dimension of all its outputs, and is taken as it lies; an input of another one with groups is that
at a place of each group."""

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

    λ has one tensor for each of the model's, of a shape that broadcasts to it: (), (C, 1, ..., 1),
    (1, C, 1, ..., 1) or its own. Where the tensors of a module, or of the whole model, share one λ,
    it is a tensor of shape () for each module, or one.
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

    @property
    def model(self) -> nn.Module:
        """What the map has been made of."""
        return self._model

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
        owners = dict.fromkeys(self._owners())
        if self.per == "module":
            return [label or _WHOLE for label in labels_of(owners)]
        return list(owners)

    def _owners(self) -> list[str]:
        """Return what has the λ of each tensor of weights."""
        names = list(self._named())
        if self.per == "model":
            return [_WHOLE] * len(names)
        return owners_of(self._model, names) if self.per == "module" else names

    def places(self) -> list[int]:
        """Return the number of the λ of each tensor of weights."""
        known: dict[str, int] = {}
        return [known.setdefault(owner, len(known)) for owner in self._owners()]

    def empty(self) -> list[Tensor]:
        """Return tensors for λ, not filled, on the device and of the dtype of the weights."""
        first: dict[str, Tensor] = {}
        for owner, weight in zip(self._owners(), self.weights(), strict=True):
            first.setdefault(owner, weight)
        shapes = dict(zip(self._owners(), self.shapes(), strict=True))
        return [weight.new_empty(shapes[owner]) for owner, weight in first.items()]

    def expand(self, values: Tensors) -> list[Tensor]:
        """Return λ, or a function of it, for each tensor of weights, to which it broadcasts."""
        self.weights()  # which refuses a model a layer of which was frozen since
        return [values[i] for i in self.places()] if self.per in _SHARED else list(values)

    def reduce(self, products: Tensors) -> list[Tensor]:
        """Return the sums over the weights that share a λ: the adjoint of `expand`."""
        if self.per == "weight":
            return list(products)
        pairs = zip(products, self.shapes(), strict=True)
        sums = [product.sum_to_size(shape) for product, shape in pairs]
        return summed_by(self.places(), sums) if self.per in _SHARED else sums

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of the λ of each tensor of weights."""
        return [self._shape(weight, name) for name, weight in self._named().items()]

    def _shape(self, weight: Tensor, name: str) -> tuple[int, ...]:
        if self.per == "weight":
            return tuple(weight.shape)
        if self.per not in ("channel", "input"):
            return ()
        if weight.ndim < 2:
            return tuple(weight.shape) if self.per == "channel" else ()
        kept = int((self.per == "input") != self._is_turned(name))
        return tuple(size if place == kept else 1 for place, size in enumerate(weight.shape))

    def _is_turned(self, name: str) -> bool:
        """Return whether a tensor has its inputs first and its outputs second."""
        owner, _, leaf = name.rpartition(".")
        module: Any = self._model.get_submodule(owner)
        # By its name: transformers is not imported for it.
        plain = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        turned = isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups == 1
        return leaf == "weight" and (plain or turned)

    def outputs_first(self, values: Tensors) -> list[Tensor]:
        """Return λ, or a function of it, with the outputs of each tensor in its first dimension."""
        if self.per in _SHARED:
            return list(values)
        pairs = zip(values, self._named(), strict=True)
        return [v.transpose(0, 1) if v.ndim > 1 and self._is_turned(n) else v for v, n in pairs]


class StackedLayout:
    """The same map for several models at once: all tensors have one dimension more, the first."""

    def __init__(self, layout: Layout) -> None:
        """Take the map of one of them."""
        self._places = layout.places()
        whole = [tuple(w.shape) for w in layout.weights()]
        self._shapes = list(zip(whole, layout.shapes(), strict=True))

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
        named_ones = [exclude] if isinstance(exclude, str) else exclude
        for entry in require_list("exclude", named_ones, "names, or a function"):
            if not isinstance(entry, str):
                raise UsageError(f"exclude must be a list of names, or a function, got {entry!r}")
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
