"""What ``tune`` may be: words, kinds, functions that make them, and several of these by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, nearest
from ift_tune.hyper import ClassWeights, Compose, ExampleWeights, HyperKind, WeightDecay, kinds_in
from ift_tune.sklearn.columns import weights_of_columns

Tune: TypeAlias = Any
"""A word of `WORDS`, a `HyperKind`, a function ``(model, inputs, targets)`` that returns one; or a
list of words, or a mapping of names to any of these."""


class Bench(NamedTuple):
    """What kinds are made for.

    Attributes:
        model: Whose weights are trained.
        inputs: Of the training split.
        targets: Likewise.
        classes: How many there are; None in regression.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    classes: int | None

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the weights."""
        return next(weight for weight in self.model.parameters() if weight.requires_grad)


def make_kind(tune: Tune, bench: Bench, given: object = None) -> HyperKind:
    """Return the kind that `tune` asks for; of several, a `Compose` under their names.

    Args:
        tune: See `Tune`.
        bench: What it is made for.
        given: The module that the user gave, which kinds may have been made for.

    Raises:
        UsageError: If it is nothing of that kind, or does not fit the data or the model.
    """
    if isinstance(tune, Mapping):
        items = {str(name): _single(part, bench, given) for name, part in tune.items()}
    elif isinstance(tune, Sequence) and not isinstance(tune, str):
        names = [_word(part) for part in tune]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"tune must name each kind once, got {twice[0]!r} twice")
        items = {name: WORDS[name](bench) for name in names}
    else:
        kind = _single(tune, bench, given)
        _require_fitting(kind, bench)
        return kind
    if not items:
        raise UsageError(f"tune must name at least one kind, got {shown(tune)}")
    for kind in items.values():
        _require_fitting(kind, bench)
    return Compose(items)


def kind_names(tune: Tune, kind: HyperKind) -> dict[str, HyperKind]:
    """Return the kinds by the names that what they learned is shown under."""
    if isinstance(kind, Compose):
        return {name: kind[name] for name in kind.kinds}
    return {tune if isinstance(tune, str) else kind.name: kind}


def _single(tune: Tune, bench: Bench, given: object) -> HyperKind:
    if isinstance(tune, str):
        return WORDS[_word(tune)](bench)
    if isinstance(tune, HyperKind):
        return _bound(tune, bench.model, given).to(bench.like.device)
    if isinstance(tune, type) or not callable(tune):
        raise UsageError(
            f"tune must be one of {', '.join(WORDS)}, a kind such as ExampleWeights(...), a "
            "function (model, inputs, targets) that returns one, or a mapping of names to these, "
            f"got {shown(tune)}"
        )
    kind = tune(bench.model, bench.inputs, bench.targets)
    if not isinstance(kind, HyperKind):
        raise UsageError(
            "the function that tune is must return a kind of hyperparameters such as "
            f"WeightDecay(model), got {shown(kind)}"
        )
    return kind.to(bench.like.device)


def _word(tune: object) -> str:
    if not isinstance(tune, str) or tune not in WORDS:
        raise UsageError(
            f"tune must be one of {', '.join(WORDS)}{nearest(str(tune), WORDS)}, or kinds by name, "
            f"got {shown(tune)}"
        )
    return tune


def _require_fitting(kind: HyperKind, bench: Bench) -> None:
    for part in kinds_in(kind, ExampleWeights):
        if len(part.raw) != len(bench.inputs):
            raise UsageError(
                f"ExampleWeights must have a weight for each of the {len(bench.inputs)} rows that "
                "are trained on: say tune='example_weights', which counts them, or give a function "
                f"(model, inputs, targets), got {len(part.raw)}"
            )


# --- the words ---------------------------------------------------------------------------------


def _weight_decay(bench: Bench) -> HyperKind:
    return _decays(bench.model)


def _example_weights(bench: Bench) -> HyperKind:
    return ExampleWeights(len(bench.inputs), like=bench.like)


def _class_weights(bench: Bench) -> HyperKind:
    if bench.classes is None:
        raise UsageError(
            "tune='class_weights' needs classes: use IFTClassifier, or another word, got a "
            "regression"
        )
    return ClassWeights(bench.classes, like=bench.like)


def _features(bench: Bench) -> HyperKind:
    """Return a decay for each column of the inputs, beside one for each later layer."""
    model = bench.model
    layers = weights_of_columns(model, bench.inputs.to(bench.like))
    if len(layers) != 1:
        found = " and ".join(layers) or "none"
        raise UsageError(
            "tune='features' needs one first layer with an input for each column: give a function "
            f"(model, inputs, targets) that returns a kind, got {found} of the weights of shape "
            f"(..., {bench.inputs.shape[1]}) that the columns enter"
        )
    (first,) = layers
    each = WeightDecay(
        model,
        "input",
        init=_START,
        transform="exp",
        exclude=lambda name, _: name != first,
    )
    if all(name == first or p.ndim < 2 for name, p in model.named_parameters() if p.requires_grad):
        return each
    return Compose({"features": each, "others": _decays(model, but=first)})


_START = 1e-2  # of decays, on inputs of unit variance


def _decays(model: nn.Module, but: str | None = None) -> WeightDecay:
    """Return a decay for each matrix of weights; biases and scales are left alone."""
    trained = [p for name, p in model.named_parameters() if p.requires_grad and name != but]
    flat = all(p.ndim < 2 for p in trained)
    return WeightDecay(
        model,
        "tensor",
        init=_START,
        transform="exp",
        exclude=lambda name, p: name == but or (p.ndim < 2 and not flat),
    )


WORDS: dict[str, Callable[[Bench], HyperKind]] = {
    "weight_decay": _weight_decay,
    "example_weights": _example_weights,
    "class_weights": _class_weights,
    "features": _features,
}


# --- kinds that were made for a model ----------------------------------------------------------


def _bound(kind: HyperKind, model: nn.Module, given: object) -> HyperKind:
    """Return a copy of a kind, acting on `model` wherever the kind refers to another.

    A decay, say, is made for a model, ``WeightDecay(net)``, and each fit trains a copy of that
    model; `sklearn.base.clone` even copies module and kind each by itself. What would be learned
    for the weights of a model that nobody trains is caught here.

    Raises:
        UsageError: If it cannot be told which part of `model` is meant.
    """
    places: dict[int, Any] = {}
    outside = sorted(_modules_outside(kind), key=lambda part: -sum(1 for _ in part.modules()))
    for other in outside:  # whole models first, which say where their parts are
        if id(other) in places:
            continue
        for own, its in zip(
            _counterpart(other, model, given).modules(), other.modules(), strict=True
        ):
            places[id(its)] = own
            ours = dict(own.named_parameters(recurse=False))
            places |= {id(p): ours[n] for n, p in its.named_parameters(recurse=False)}
    return copy.deepcopy(kind, places)


def _counterpart(other: nn.Module, model: nn.Module, given: object) -> nn.Module:
    """Return the part of a model that is what another module is: in its place, or alone like it."""
    if isinstance(given, nn.Module):
        for name, part in given.named_modules():
            if part is other:
                return model.get_submodule(name)
    alike = [part for part in model.modules() if _form(part) == _form(other)]
    if len(alike) == 1:
        return alike[0]
    raise UsageError(
        f"tune is a kind for a {type(other).__name__} of which the estimator's model has "
        f"{len(alike)}: give a function (model, inputs, targets) that makes the kind for the model "
        "that is trained, such as lambda model, X, y: WeightDecay(model)"
    )


def _form(module: nn.Module) -> tuple[object, ...]:
    parts = [(name, type(part)) for name, part in module.named_modules()]
    return (*parts, *((name, tuple(p.shape)) for name, p in module.named_parameters()))


def _modules_outside(kind: HyperKind) -> Iterator[nn.Module]:
    """Yield the modules that a kind refers to without holding them as its own."""
    own = {id(part) for part in kind.modules()}
    seen: set[int] = set()
    left: list[Any] = [part.__dict__ for part in kind.modules()]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, Tensor | type | str | bytes):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if id(value) not in own:
                yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        else:
            left += [vars(value)] if hasattr(value, "__dict__") else []
