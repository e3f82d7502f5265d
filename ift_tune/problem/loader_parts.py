"""What a loader is made of: the generators that it draws from, and what may keep a position."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import data

from ift_tune.base.generators import GENERATORS, Generator
from ift_tune.problem.batches import Batches, Loader


def generators_of(loader: Loader) -> list[Generator]:
    """Return the generators that a loader, or something inside of it, has as attributes."""
    return [part for part in _parts(loader) if isinstance(part, GENERATORS)]


def places_of(loader: Loader) -> set[int]:
    """Return the identities of what may keep the position of a pass outside of its iterator."""
    return {
        id(part)
        for part in _parts(loader)
        if (part is loader or _is_passed_over(part)) and not _begins_anew(part)
    }


def _parts(loader: Loader) -> list[Any]:
    """Return a loader and what has a part in its passes, however deep, each once.

    Those are loaders, samplers, data sets, iterators and generators, as attributes of whatever
    name. So what is drawn from and what is moved are looked for in the same places.
    """
    found: list[Any] = [loader]
    seen = {id(loader)}
    for part in found:  # which grows meanwhile
        held = dict(getattr(part, "__dict__", {}))
        if isinstance(part, data.DataLoader):
            held.pop("_iterator", None)  # of persistent workers: no pass of ours is in it
        for value in held.values():
            if id(value) not in seen and _takes_part(value):
                seen.add(id(value))
                found.append(value)
    return found


def _takes_part(value: Any) -> bool:
    return isinstance(value, (*GENERATORS, data.Dataset)) or _is_passed_over(value)


def _is_passed_over(value: Any) -> bool:
    """Return whether something is there for passes over it, so that it may know how far one is.

    Whatever can be iterated over and not be looked up. What is asked for its entries, as arrays,
    frames, lists and sets are, is the data, which several loaders may well have in common.
    """
    if isinstance(value, Iterator | data.IterableDataset | data.Sampler | data.DataLoader):
        return True
    kind = type(value)
    looked_up = hasattr(kind, "__getitem__") or hasattr(kind, "__contains__")
    return hasattr(kind, "__iter__") and not looked_up


_PLAIN = (
    Batches,
    list,
    tuple,
    data.SequentialSampler,
    data.RandomSampler,
    data.SubsetRandomSampler,
    data.WeightedRandomSampler,
    data.BatchSampler,
)


def _begins_anew(part: Any) -> bool:
    """Return whether a pass over something is known to keep its position to itself."""
    if isinstance(part, data.DataLoader):
        return type(part).__iter__ is data.DataLoader.__iter__
    return type(part) in _PLAIN


def apart(loader: Loader) -> Loader:
    """Return the loader, or a copy whose workers are its own and begin anew with each pass.

    A `DataLoader` with persistent workers has one iterator, which every pass resets. Its workers
    keep their random numbers besides, so that no pass could be drawn again.
    """
    if isinstance(loader, data.DataLoader):
        change = {"persistent_workers": False, "_iterator": None}
        changes: dict[str, Any] = change if loader.persistent_workers else {}
    else:  # what wraps a DataLoader, to prefetch or to move batches
        inner = getattr(loader, "__dict__", {}).items()
        copies = {n: apart(v) for n, v in inner if isinstance(v, data.DataLoader)}
        changes = {n: v for n, v in copies.items() if v is not vars(loader)[n]}
    return _with(loader, changes) if changes else loader


class Noted:
    """A sampler that notes what it draws first in each pass.

    Which examples a pass begins with tells its order, whatever augmentation makes of them.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        """Draw what `sampler` draws."""
        self._sampler = sampler
        self._first: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Start a pass."""
        return self._noting(iter(self._sampler))  # at once: samplers may draw where a pass begins

    def _noting(self, drawn: Iterator[Any]) -> Iterator[Any]:
        for number, places in enumerate(drawn):
            if number == 0:
                self._first = places
            yield places

    def first(self) -> Tensor | None:
        """Return what was drawn first; None where that is no numbers."""
        try:
            return torch.as_tensor(self._first)
        except (TypeError, ValueError, RuntimeError):
            return None


def noting(loader: Loader) -> tuple[Loader, Noted | None]:
    """Return a loader of the same batches and what notes its order, if a sampler draws that."""
    if (
        not isinstance(loader, data.DataLoader)
        or type(loader).__iter__ is not data.DataLoader.__iter__
        or isinstance(loader.dataset, data.IterableDataset)
    ):
        return loader, None
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    noted = Noted(getattr(loader, name))
    return _with(loader, {name: noted}), noted


def _with(loader: Loader, changes: dict[str, Any]) -> Loader:
    loader = copy.copy(loader)
    vars(loader).update(changes)  # a DataLoader refuses to be set
    return loader
