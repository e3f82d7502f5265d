"""What a loader is made of: what its order follows from, and what may keep a position."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import data

from ift_tune.base.generators import GENERATORS, Generator, set_states, states_of
from ift_tune.problem.batches import Batches, Loader


class Sources:
    """What the order of a loader's passes follows from: generators, and what samplers count.

    A sampler often seeds a generator anew in each pass, by the number of passes so far. So whole
    numbers that a sampler has as attributes are a part of the state. Those of loaders and data sets
    are not: they may stand for a position elsewhere, in a file say, that nobody puts back.
    """

    def __init__(self, generators: Sequence[Generator], samplers: Sequence[Any] = ()) -> None:
        """Take the generators, and the samplers that may count."""
        self._generators, self._samplers = generators, samplers

    @classmethod
    def of(cls, loader: Loader) -> Sources:
        """Return those of a loader."""
        return cls(generators_of(loader), _samplers_of(loader))

    def seen_formerly(self, number: int) -> Sources:
        """Return the first few, as versions saw them that knew PyTorch's generators alone."""
        known = [g for g in self._generators if isinstance(g, torch.Generator)]
        return Sources(known[:number])

    def states(self) -> dict[str, list[Any]]:
        """Return the states as tensors and plain values, by names."""
        counts = [
            {name: value for name, value in vars(sampler).items() if type(value) is int}
            for sampler in self._samplers
        ]
        return {"generators": states_of(self._generators), "counts": counts}

    def put_back(self, states: Mapping[str, list[Any]]) -> None:
        """Go to what `states` returned; of earlier versions, which kept no counts, too.

        Raises:
            ValueError: If there are not as many.
        """
        set_states(self._generators, states["generators"])
        if "counts" in states:
            for sampler, counts in zip(self._samplers, states["counts"], strict=True):
                vars(sampler).update(counts)

    @contextlib.contextmanager
    def left_alone(self) -> Iterator[None]:
        """Leave them afterwards as they were before."""
        before = self.states()
        try:
            yield
        finally:
            self.put_back(before)


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


def _samplers_of(loader: Loader) -> list[Any]:
    """Return the samplers inside of a loader that are not PyTorch's plain ones."""
    parts = _parts(loader)
    loaders = [part for part in parts if isinstance(part, data.DataLoader)]
    drawn_from = {id(one) for each in loaders for one in (each.sampler, each.batch_sampler)}
    return [
        part
        for part in parts
        if (isinstance(part, data.Sampler) or id(part) in drawn_from)
        and not _begins_anew(part)
        and hasattr(part, "__dict__")
    ]


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
