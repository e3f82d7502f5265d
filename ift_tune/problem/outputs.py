"""How a batch is taken apart, a model called with it, and what it returns read: the one place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.problem.batches import INDEX, LABELS, Batch, map_batch, named_parts, tensors_of

OUTPUTS = ("logits", "predictions", "prediction", "preds", "pred", "outputs", "output", "out")
"""The names that what a model predicts may have in what it returns, the first that is there."""

LOSS = "loss"


class Parts(NamedTuple):
    """What a batch of examples with targets holds.

    Attributes:
        inputs: For the model.
        targets: With an entry for each example; None where the batch has none.
        index: Position of each example in the training split; None where the batch does not tell.
        labels: The targets by the name that the batch gives them, none or one; None if they stand
            beside the inputs.
    """

    inputs: Any
    targets: Tensor | None
    index: Any = None
    labels: dict[str, Any] | None = None


def batch_parts(batch: Batch, who: str) -> Parts:
    """Return the parts of a batch ``(inputs, targets)``, ``(inputs, targets, index)`` or by names.

    Args:
        batch: As the loader gives it.
        who: The problem, for errors.

    Raises:
        UsageError: If it has none of these forms.
    """
    positions = isinstance(batch, list | tuple) and not _names_labels(batch)
    named = dict(zip(batch._fields, batch, strict=True)) if _names_labels(batch) else None
    if not positions:
        named = named or named_parts(batch)
    if named is not None:
        index = named.pop(INDEX, None)
        label = next((name for name in LABELS if name in named), None)
        labels = {} if label is None else {label: named.pop(label)}
        targets = labels.get(str(label))
        told = isinstance(targets, Tensor) and targets.ndim > 0
        return Parts(named, targets if told else None, index, labels)
    if not positions or len(batch) not in (2, 3):
        size = f" of {len(batch)}" if positions else ""
        raise UsageError(
            f"batches of a {who} must be (inputs, targets) or (inputs, targets, index), or have an "
            f"entry {LABELS[0]!r}: let the loader yield them so, or subclass BilevelProblem; got a "
            f"{type(batch).__name__}{size}"
        )
    inputs, targets, *rest = batch
    if not isinstance(targets, Tensor) or not targets.ndim:
        found = "a scalar" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise UsageError(
            "the targets of a batch must be a tensor with an entry for each example: convert "
            f"arrays by torch.as_tensor, got {found}"
        )
    return Parts(inputs, targets, rest[0] if rest else None)


def _names_labels(batch: Batch) -> bool:
    """Return whether a batch is a named tuple that says itself which entry the targets are."""
    fields = getattr(batch, "_fields", ())
    return any(name in fields and fields.index(name) != 1 for name in LABELS)


class Reading(NamedTuple):
    """What a model has returned.

    Attributes:
        outputs: What it predicts; None if it tells its loss alone.
        loss: The loss that it has computed itself, from targets that it was given; None if none.
        ignored: Other losses among what it has returned, which nobody adds up.
    """

    outputs: Tensor | None
    loss: Tensor | None = None
    ignored: tuple[str, ...] = ()


def call_model(model: nn.Module, inputs: Any, labels: Mapping[str, Any] | None = None) -> Reading:
    """Return what a model makes of the inputs of a batch.

    Inputs by name are given to the arguments of these names, and so are the targets, where the
    model takes them: it may then return its loss. Entries that it has no arguments for are left
    out. A model whose one argument is none of the names is given the whole mapping.

    Args:
        model: Any module.
        inputs: A tensor, or whatever else the model takes as its argument; or inputs by name.
        labels: The targets, by the name that the batch gives them; none where it has none, and
            the model does without. None if they stand beside the inputs.

    Raises:
        UsageError: If the model can be called in none of these ways, fails on inputs of another
            precision than its own, or returns what cannot be read.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def forward(self, ids, labels=None):
        ...         return {"logits": ids, "loss": None if labels is None else labels.mean()}
        >>> call_model(Model(), {"ids": torch.ones(2, 2), "name": ["a", "b"]}).outputs.shape
        torch.Size([2, 2])
        >>> call_model(Model(), {"ids": torch.ones(2, 2)}, {"labels": torch.ones(2)}).loss
        tensor(1.)
    """
    try:
        return _called(model, inputs, labels)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError | UsageError):
            raise
        tensors = tensors_of(inputs)
        theirs = {t.dtype for t in tensors if t.is_floating_point()}
        own = {p.dtype for p in model.parameters() if p.is_floating_point()}
        wanted = min(own, key=str, default=None)
        if theirs and own and not theirs & own:
            (given, *_) = sorted(map(str, theirs))
            raise UsageError(
                f"inputs must be of the model's type, {wanted}: convert them where the loaders are "
                f"made (Splits.from_arrays does), or the model; got {given} ({error})"
            ) from error
        if tensors and not theirs and wanted and _takes(model, inputs, labels, wanted):
            raise UsageError(
                f"inputs must be of the model's type, {wanted}: give the loaders real numbers, as "
                f"by inputs.astype('float32') or inputs.float(); got {tensors[0].dtype} ({error})"
            ) from error
        raise


def _takes(
    model: nn.Module, inputs: Any, labels: Mapping[str, Any] | None, dtype: torch.dtype
) -> bool:
    """Return whether a model takes its inputs as real numbers, where they are whole ones."""
    try:
        with torch.no_grad():
            _called(model, map_batch(lambda t: t.to(dtype), inputs), labels)
    except (RuntimeError, ValueError, UsageError):
        return False
    return True


def _called(model: nn.Module, inputs: Any, labels: Mapping[str, Any] | None) -> Reading:
    if not isinstance(inputs, Mapping):
        return read_outputs(model(inputs), told=False)
    signature = inspect.signature(getattr(model, "_orig_mod", model).forward)
    known, others = _arguments(signature)
    taken = {
        key: value
        for key, value in {**inputs, **(labels or {})}.items()
        if key in known or (others and isinstance(key, str) and isinstance(value, Tensor | Mapping))
    }
    alone = labels is not None and not labels
    if taken and _binds(signature, **taken):
        return read_outputs(model(**taken), told=alone or any(key in taken for key in LABELS))
    if _binds(signature, inputs):
        return read_outputs(model(inputs), told=alone)
    raise UsageError(
        "the model must take the entries of a batch by name, or all of them as one argument: give "
        f"its forward the arguments {', '.join(map(str, inputs))}, or subclass BilevelProblem; got "
        f"forward{signature}"
    )


def _arguments(signature: inspect.Signature) -> tuple[set[str], bool]:
    """Return the names of a function's arguments, and whether it takes any others."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {name for name, kind in kinds.items() if kind in named}
    return known, inspect.Parameter.VAR_KEYWORD in kinds.values()


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def read_outputs(returned: Any, *, told: bool = True) -> Reading:
    """Return what is predicted, and the model's own loss, in whatever form a model returns them.

    A tensor is what is predicted. Of a mapping or an object it is the entry with a name of
    `OUTPUTS`, or the only tensor; of a tuple the first tensor that is no scalar. The loss is the
    entry ``loss``, or a tuple's scalar.

    Args:
        returned: What the model has returned.
        told: Whether the model was given the targets. Else what looks like a loss is none of the
            targets.

    Raises:
        UsageError: If neither is there.

    Example:
        >>> import torch
        >>> read_outputs((torch.zeros(2, 3), torch.zeros(2, 5))).outputs.shape
        torch.Size([2, 3])
        >>> read_outputs({"hidden": torch.zeros(2, 3), "cell": torch.zeros(2, 3)})
        Traceback (most recent call last):
        ift_tune.base.errors.UsageError: the model must return its predictions as one tensor, ...
    """
    if isinstance(returned, Tensor):
        if returned.ndim == 0 and told:
            return Reading(None, returned)
        return Reading(returned)
    named, plain = _parts(returned)
    tensors = {name: v for name, v in named.items() if isinstance(v, Tensor)}
    scalars = {n: v for n, v in tensors.items() if v.ndim == 0 and v.is_floating_point()}
    own = None
    if told and scalars:
        own = next(iter(scalars)) if plain else LOSS if LOSS in scalars else None
    outputs = _first(named) if plain else _by_name(tensors)
    if outputs is None and own is None:
        raise UsageError(
            "the model must return its predictions as one tensor, by a name such as "
            f"{OUTPUTS[0]!r}, or first in a tuple: let forward do so, or subclass BilevelProblem; "
            f"got a {type(returned).__name__} of "
            f"{', '.join(f'{name}: {type(v).__name__}' for name, v in named.items()) or 'nothing'}"
        )
    # Where the model was told the targets, its loss is taken to hold all there is.
    ignored = [] if own else [n for n, v in scalars.items() if v.requires_grad]
    return Reading(outputs, None if own is None else scalars[own], tuple(ignored))


def _parts(returned: Any) -> tuple[dict[str, Any], bool]:
    """Return what a model has returned by name, and whether those are but places in a tuple."""
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return dict(zip(returned._fields, returned, strict=True)), False
    if isinstance(returned, tuple) or (isinstance(returned, list) and len(returned) == 1):
        return {f"entry {number}": value for number, value in enumerate(returned, 1)}, True
    parts = named_parts(returned) or {}
    return {str(name): value for name, value in parts.items()}, False


def _first(entries: Mapping[str, Any]) -> Tensor | None:
    """Return the first entry of a tuple that is neither missing nor a number, if it is a tensor."""
    for entry in entries.values():
        if isinstance(entry, Tensor) and entry.ndim:
            return entry
        if entry is not None and not isinstance(entry, Tensor | int | float):
            return None
    return None


def _by_name(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the entry with one of the names, or the only one that there is."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    for name in OUTPUTS:
        if name in tensors:
            return tensors[name]
    real = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    return real[0] if len(real) == 1 else None
