"""Batches: their structure and devices, and a loader of tensors in memory."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ift_tune.base.errors import UsageError
from ift_tune.problem.contents import Contents, note

Batch: TypeAlias = Any
"""Whatever a loader yields: a tensor, or a tuple, list, mapping or object that holds some."""

LABELS = ("labels", "label", "targets", "target", "y")
"""The entries of a mapping that may hold the targets, the first that is there."""

INDEX = "index"
"""The entry of a mapping that holds each example's position in the training split."""


@runtime_checkable
class Loader(Protocol):
    """Anything that can be iterated over again and again: a `DataLoader`, a list, `Batches`."""

    def __iter__(self) -> Any:
        """Start one pass over the split."""


def map_batch(
    function: Callable[[Tensor], Tensor],
    batch: Batch,
    others: Callable[[Any], Any] = lambda value: value,
) -> Batch:
    """Return the batch with `function` applied to every tensor, its structure kept.

    Args:
        function: Of a tensor.
        batch: Not modified.
        others: Of whatever is found that holds no tensors that can be told.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if type(batch) in (tuple, list):  # first, for it is what most inner steps have
        return type(batch)([map_batch(function, value, others) for value in batch])
    if isinstance(batch, PackedSequence):  # whose `batch_sizes` stay on the CPU
        rows, sizes, *order = batch
        moved = [index if index is None else function(index) for index in order]
        return PackedSequence(function(rows), sizes, *moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(function, value, others) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_batch(function, value, others) for value in batch)
    if (parts := named_parts(batch)) is None:
        return others(batch)
    mapped = {key: map_batch(function, value, others) for key, value in parts.items()}
    if type(batch) is dict:
        return mapped
    return _with_items(batch, mapped) if _has_items(batch) else _with_attributes(batch, mapped)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch, whatever its structure."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_batch(note, batch)
    return found


def named_parts(batch: Batch) -> dict[Any, Any] | None:
    """Return what a batch holds by name; None if it is nothing of that kind.

    So do mappings, and what has their methods, data classes (attrs' too), and other objects that
    have tensors as attributes.
    """
    if isinstance(batch, Tensor | nn.Module | list | tuple | type):
        return None
    if _has_items(batch):
        return {key: batch[key] for key in batch.keys()}  # noqa: SIM118  (keys are all it need have)
    if (names := _declared(batch)) is not None:
        return {name: getattr(batch, name) for name in names}
    slots = [name for kind in type(batch).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*getattr(batch, "__dict__", ()), *(n for n in slots if hasattr(batch, n))]
    held = {name: getattr(batch, name) for name in names}
    return held if any(isinstance(value, Tensor) for value in held.values()) else None


def _declared(batch: Batch) -> list[str] | None:
    """Return the names of a data class's fields, attrs' too; None if it is none."""
    if is_dataclass(batch):
        return [field.name for field in fields(batch)]
    attributes = getattr(type(batch), "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]


def _has_items(batch: Batch) -> bool:
    """Return whether a batch is a mapping, or has the methods of one."""
    if isinstance(batch, Mapping) or _declared(batch) is not None:
        return isinstance(batch, Mapping)
    return callable(getattr(batch, "keys", None)) and hasattr(type(batch), "__getitem__")


def _with_items(batch: Batch, parts: dict[Any, Any]) -> Batch:
    """Return a copy of a mapping with other values, or a dict of them where none can be made."""
    try:
        twin = copy.copy(batch)
    except TypeError:  # a view, such as types.MappingProxyType
        return parts
    settable = hasattr(type(batch), "__setitem__")
    for name, value in getattr(twin, "__dict__", {}).items():
        if type(value) is dict:  # the one inside, which the copy shares
            new = {k: parts.get(k, v) for k, v in value.items()} if not settable else dict(value)
            object.__setattr__(twin, name, new)
    if settable:
        for key, value in parts.items():
            twin[key] = value
    return twin if all(twin[key] is value for key, value in parts.items()) else parts


def _with_attributes(batch: Batch, parts: dict[Any, Any]) -> Batch:
    twin = copy.copy(batch)
    for name, value in parts.items():  # past __setattr__, which a frozen one refuses
        object.__setattr__(twin, name, value)
    return twin


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`; the same tensors where they are already.

    What holds its tensors out of sight, as graphs of other libraries do, is moved by its ``to``.
    """

    def move(value: Any) -> Any:
        return value.to(device) if callable(getattr(value, "to", None)) else value

    def carry(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        if moved is not tensor and tensor.is_cpu and not tensor.is_inference():
            note(moved, Contents(tensor))  # whose values can still be looked at where they were
        return moved

    return map_batch(carry, batch, move)


_AHEAD, _PASSES = 2**18, 1024
"""The most entries of permutations that are carried to a device together, 2 MB, and the most
permutations."""

_AT_ONCE = 16
"""Batches whose rows are taken together on a device."""


class Batches:
    """A loader over tensors in memory, on their device: no workers, no collation, no copies.

    Iterating yields tuples of rows, one permutation a pass. A pass that does not divide evenly
    drops its rest, like ``DataLoader(drop_last=True)``; the next permutation brings other examples.
    A mapping of tensors in a tensor's place yields mappings, and by itself no tuples but those.

    Example:
        >>> import torch, ift_tune
        >>> batches = ift_tune.Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [[tuple(t.shape) for t in batch] for batch in batches]
        [[(2,), (2,)], [(2,), (2,)]]
        >>> [targets.tolist() for _, targets in batches.in_order()]
        [[0, 1], [2, 3], [4]]
        >>> [dict(batch) for batch in ift_tune.Batches({"ids": torch.arange(2)})]
        [{'ids': tensor([0, 1])}]
    """

    def __init__(
        self,
        *tensors: Tensor | Mapping[str, Tensor],
        batch_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Take the tensors.

        Args:
            tensors: Each of shape (N, ...), on one device; or mappings of such.
            batch_size: Examples a batch, at most N; None gives all in one batch, unshuffled.
            seed: Of the permutations.
            shuffle: Whether passes are permutations. Else every pass has all rows in their order.

        Raises:
            UsageError: If one is not a tensor, or the sizes or the devices do not agree.
        """
        flat = [t for part in tensors for t in _columns(part)]
        for tensor in flat:
            if not isinstance(tensor, Tensor):
                # Not converted: NumPy's float64 would meet a model in float32.
                raise UsageError(
                    "Batches takes tensors: convert an array by torch.as_tensor(array, "
                    "dtype=torch.float32), a frame's by frame.to_numpy() first, or let "
                    "Splits.from_arrays do all of it; got "
                    f"{type(tensor).__module__.partition('.')[0]}'s {type(tensor).__name__}"
                )
        devices = {str(t.device) for t in flat}
        if len(devices) > 1:
            raise UsageError(f"tensors must be on one device, got {', '.join(sorted(devices))}")
        sizes = {t.shape[0] if t.ndim else 0 for t in flat}
        if len(sizes) != 1 or 0 in sizes:
            raise UsageError(f"tensors need one common, positive first dimension, got {sizes}")
        self.tensors: tuple[Any, ...] = tensors
        self.size = sizes.pop()
        if batch_size is not None and batch_size not in range(1, self.size + 1):
            raise UsageError(f"batch_size must be in 1..{self.size}, got {batch_size}")
        self.batch_size, self.shuffle = batch_size, shuffle
        self.generator = torch.Generator().manual_seed(seed)
        self.device = flat[0].device
        self._ahead: deque[tuple[Tensor, Tensor]] = deque()
        self._known: dict[int, Contents] = {}

    def __iter__(self) -> Iterator[Batch]:
        """Start a pass."""
        if self.batch_size is None or not self.shuffle:
            yield from self.in_order()
            return
        order = self._order(self.batch_size)
        if self.device.type == "cpu":
            for chosen in torch.split(order, self.batch_size):
                yield self._rows(partial(torch.index_select, dim=0, index=chosen))
            return
        for chosen in torch.split(self._carried(order), _AT_ONCE * self.batch_size):
            yield from self._cut(chosen, self.batch_size)

    def places(self) -> Iterator[Tensor]:
        """Start a pass, and yield in place of each batch where its rows are, on the CPU."""
        if self.batch_size is None or not self.shuffle:
            yield from torch.split(torch.arange(self.size), self.batch_size or self.size)
        else:
            yield from torch.split(self._order(self.batch_size), self.batch_size)

    def _order(self, size: int) -> Tensor:
        """Return the next permutation, without what is left of whole batches of a size.

        On the CPU, so that it is the same wherever the tensors are.
        """
        order = torch.randperm(self.size, generator=self.generator)
        return order[: self.size // size * size]

    def _cut(self, chosen: Tensor, size: int) -> Iterator[Batch]:
        """Yield batches of rows that are taken together, for each tensor by one kernel."""
        every: list[list[Tensor]] = []

        def take(tensor: Tensor) -> Tensor:
            every.append(list(torch.split(torch.index_select(tensor, 0, chosen), size)))
            return every[-1][0]

        map_batch(take, self.tensors)
        for parts in map(iter, zip(*every, strict=True)):
            yield self._rows(partial(_next_of, parts))

    def _carried(self, order: Tensor) -> Tensor:
        """Return a permutation on the tensors' device, those of later passes carried with it.

        The generator goes on as if nothing had been drawn ahead: a permutation that was is used
        where it turns out to be the next one, which nobody can tell who may draw in between.
        """
        if self._ahead and torch.equal(self._ahead[0][0], order):
            return self._ahead.popleft()[1]
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        later = [
            torch.randperm(self.size, generator=generator)[: len(order)]
            for _ in range(min(_AHEAD // self.size, _PASSES))
        ]
        orders = torch.stack([order, *later])
        self._ahead = deque(zip(orders, orders.to(self.device), strict=True))
        return self._ahead.popleft()[1]

    def drawn(self, seed: int) -> Iterator[Batch]:
        """Yield all rows once, in an order drawn by a seed of one's own, the last batch smaller."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        size = self.batch_size or self.size
        for chosen in torch.split(order.to(self.device), size):
            yield self._rows(partial(torch.index_select, dim=0, index=chosen))

    def in_order(self) -> Iterator[Batch]:
        """Yield all rows in their order, the last batch smaller where it must be."""
        if self.batch_size is None:
            yield self._rows(lambda tensor: tensor)
            return
        for start in range(0, self.size, self.batch_size):
            yield self._rows(itemgetter(slice(start, start + self.batch_size)))

    def _rows(self, take: Callable[[Tensor], Tensor]) -> Batch:
        """Return the rows that `take` takes of each tensor."""
        rows = map_batch(lambda t: self.noted(take(t), t), self.tensors)
        return rows[0] if len(rows) == 1 and isinstance(rows[0], Mapping) else rows

    def noted(self, rows: Tensor, tensor: Tensor) -> Tensor:
        """Return rows of one of the tensors, with a note of what is known of that on a device."""
        return rows if rows.is_cpu else note(rows, self._contents(tensor))

    def _contents(self, tensor: Tensor) -> Contents:
        """Return what is known of one of the tensors, and so of its rows."""
        known = self._known.get(id(tensor))
        if known is None or known.stale:
            known = self._known[id(tensor)] = Contents(tensor)
        return known


def _next_of(parts: Iterator[Tensor], _tensor: Tensor) -> Tensor:
    return next(parts)


def _columns(part: Any) -> list[Any]:
    """Return the tensors of a part of all batches."""
    return list(part.values()) if isinstance(part, Mapping) else [part]
