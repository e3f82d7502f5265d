"""How many examples a batch has: told by its shapes, or not told at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ift_tune.base.errors import UsageError
from ift_tune.problem.batches import named_parts

_MEND = "override batch_size(batch) of the problem to say how many there are"


def guess_batch_size(batch: Any) -> int:
    """Return the number of examples that every tensor of a batch agrees on.

    It is the common first dimension of the tensors, wherever they lie in tuples, mappings and data
    classes; of a packed sequence, the number of sequences. A list could hold the inputs and the
    targets, as `DataLoader` gives them, or one tensor an example: where its entries do not tell
    which, there is no guess. A batch without examples to count, a lone scalar, has one.

    Raises:
        UsageError: If the tensors disagree, or could be counted in two ways.

    Example:
        >>> import torch
        >>> guess_batch_size({"ids": torch.zeros(8, 20), "labels": torch.zeros(8)})
        8
        >>> guess_batch_size((torch.zeros(20, 8), torch.zeros(8)))
        Traceback (most recent call last):
            ...
        ift_tune.base.errors.UsageError: the tensors of a batch differ in their first dimension, ...
    """
    if isinstance(batch, Tensor) and batch.ndim:  # the short way: this is asked at every step
        return batch.size(0)
    if isinstance(batch, list) and len(batch) == 1 and isinstance(batch[0], Tensor):
        batch = batch[0]  # the one column of a TensorDataset
    found = set(_sizes(batch, outermost=True))
    if not found:
        raise UsageError(
            "a batch must hold at least one tensor: convert arrays and frames by torch.as_tensor, "
            f"or {_MEND}; got {_name(batch)}"
        )
    if found == {None}:
        return 1
    if None in found:
        raise UsageError(
            f"a batch holds scalars beside tensors, so it may be one example or many: {_MEND}; "
            f"got {_name(batch)}"
        )
    if len(found) > 1:
        sizes = " and ".join(str(size) for size in sorted(s for s in found if s is not None))
        raise UsageError(
            "the tensors of a batch differ in their first dimension, which counts the examples: "
            f"{_MEND}; got {sizes}"
        )
    (size,) = found
    return size or 0


def as_size(size: Any) -> int | float:
    """Return what a `batch_size` of the user's own has said, as a number.

    Raises:
        UsageError: If it is not one of at least 0.
    """
    if type(size) is int and size >= 0:
        return size
    try:
        value = size.item() if hasattr(size, "item") else size
    except (RuntimeError, ValueError):  # more than one entry
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"batch_size(batch) must return a number, got {_name(size)}")
    if not 0 <= value < math.inf:
        raise UsageError(f"batch_size(batch) must be finite and at least 0, got {value!r}")
    return value


def _sizes(part: Any, *, outermost: bool = False) -> Iterator[int | None]:
    """Yield the first dimension of each tensor, None for a scalar."""
    if isinstance(part, Tensor):
        yield part.size(0) if part.ndim else None
    elif isinstance(part, PackedSequence):
        yield int(part.batch_sizes[0])
    elif isinstance(part, list | tuple):
        # The parts of a tuple have roles; in a list, and in whatever stands inside, as
        # tuple(zip(*examples)) makes it, equal entries may as well be one example each.
        roles = hasattr(part, "_fields") or (outermost and isinstance(part, tuple))
        kinds = [_kind(entry) for entry in part]
        told = [kind for kind in kinds if kind is not None]
        if told and not roles and len(set(told)) == 1 and (len(told) > 1 or "of" in told[0]):
            raise UsageError(
                f"a batch holds a {type(part).__name__} of {len(part)} alike, which may be one "
                f"example each or parts of all of them: {_MEND}; got {_name(part)}"
            )
        for entry in part:
            yield from _sizes(entry)
    elif (named := named_parts(part)) is not None:
        for value in named.values():
            yield from _sizes(value)


def _kind(part: Any) -> tuple[Any, ...] | None:
    """Return what tells two entries of a list apart; None for what holds no tensor."""
    if isinstance(part, Tensor):
        return (part.dtype, *part.shape)
    if isinstance(part, PackedSequence):
        return ("packed",)
    sequence = isinstance(part, list | tuple)
    inside = list(part) if sequence else list((named_parts(part) or {}).values())
    # Of containers the shapes do not matter: ragged examples are examples too.
    held = tuple(_role(kind) for kind in map(_kind, inside) if kind is not None)
    return ("of", *held) if held else None


def _role(kind: tuple[Any, ...]) -> Any:
    """Return a tensor's type, or a container's whole kind."""
    return kind if kind[0] in ("of", "packed") else kind[0]


def _name(value: Any) -> str:
    """Return a few words for a value of the user's."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value[:4])}"
    return f"a {type(value).__name__}"
