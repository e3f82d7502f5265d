"""Passes over loaders: once through for measuring, and an endless walk that can be resumed."""

from __future__ import annotations

import contextlib
import copy
import random
import weakref
from collections.abc import Generator, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState
from ift_tune.problem.batches import Batch, Batches, Loader, tensors_of

_ENDLESS = 10_000  # batches of a pass over a loader that does not say how many it has


def once_through(loader: Loader) -> Generator[Batch, None, None]:
    """Yield each batch once, for measuring: no walk is moved, no generator of the loader's own."""
    if isinstance(loader, Batches):
        yield from loader.in_order()
        return
    _suspend_walks(_places(loader))
    generators = _generators(loader)
    before = [g.get_state() for g in generators]
    try:
        yield from _ending(loader, _apart(loader))
    finally:  # whoever wants but one batch leaves early
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def rows_of_loader(loader: Loader) -> int | None:
    """Return how many rows a loader's data have, if that is known without a pass.

    Unknown are streams, lists of batches, and subsets, whose examples may keep the positions that
    they have in the whole.
    """
    if isinstance(loader, Batches):
        return loader.size
    if isinstance(loader, data.DataLoader) and isinstance(loader.dataset, Sized):
        return None if isinstance(loader.dataset, data.Subset) else len(loader.dataset)
    return None


def drawn_batches(loader: Loader, number: int, seed: int) -> list[Batch]:
    """Return some batches of one pass, drawn at random: their examples stand for the split's.

    The first ones would not, where the data are in an order, by class for instance. Of `Batches`
    the examples are drawn; of another loader, which alone knows how to make a batch, the batches.

    Args:
        loader: It is left as it was.
        number: Of batches; all where there are fewer.
        seed: Of the draw.
    """
    if isinstance(loader, Batches):
        return list(islice(loader.drawn(seed), number))
    chosen: list[Batch] = []
    draw = random.Random(seed)
    with contextlib.closing(once_through(loader)) as batches:
        for place, batch in enumerate(batches):  # each stays with the same chance, at any length
            if place < number:
                chosen.append(batch)
            elif (at := draw.randrange(place + 1)) < number:
                chosen[at] = batch
    return chosen


def _ending(loader: Loader, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a pass that comes to an end, as long as the loader says it is.

    Raises:
        UsageError: If there is no end in sight.
    """
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:  # a stream does not know
        length = None
    for number, batch in enumerate(batches):
        if number == length:
            return
        if length is None and number == _ENDLESS:
            raise UsageError(
                f"a pass over a {type(loader).__name__} must end, got {_ENDLESS:,} batches and no "
                "end: give it a __len__, after which it is left, or wrap a part of it in a list"
            )
        yield batch


def first_batch(name: str, loader: Loader) -> Batch:
    """Return the first batch of a split as `once_through` yields it.

    Raises:
        UsageError: If the loader yields none.
    """
    with contextlib.closing(once_through(loader)) as batches:
        for batch in batches:
            return batch
    raise UsageError(f"the {name} loader yields no batch: give it at least one full batch_size")


class Cursor:
    """An endless walk over a loader, pass after pass, whose position can be saved.

    A saved position is the random state at the start of the pass and the number of batches since:
    a resumed walk starts the pass again with that state and skips so many. That is exact for any
    loader whose order is drawn when a pass begins, as `Batches` and `DataLoader` do. The states
    of the loader's own generators are saved as well, for others may draw from them too.

    So does a walk that was suspended, because another pass over the same loader began meanwhile and
    may have moved it: ``iter(loader)`` need not be independent of the one before.
    """

    def __init__(self, name: str, loader: Loader, device: torch.device) -> None:
        """Walk over `loader`; `name` is for errors, `device` for its random numbers."""
        self._name = name
        self._loader = _apart(loader)
        self._places = _places(loader)
        self._device = device
        self._generators = _generators(loader)
        self._iterator: Iterator[Batch] | None = None
        self._start: _Start | None = None
        self._consumed = 0
        self._last: Tensor | None = None
        if self._places:
            _walks.add(self)

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            UsageError: If the loader yields none, or cannot be begun again where another pass
                over it has moved it.
        """
        if self._iterator is None and self._start is not None:
            self._find_place()
        iterator = self._begin() if self._iterator is None else self._iterator
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                if self._consumed == 0:
                    raise UsageError(f"the {self._name} loader yields no batch") from None
                iterator = self._begin()
                continue
            self._consumed += 1
            if self._places:  # what it was, whatever the losses do to it in place
                self._last = _first_tensor(batch)
            return batch

    def suspend(self) -> None:
        """Let go of the loader's iterator and its workers; `next` finds the place again."""
        self._iterator = None

    def _find_place(self) -> None:
        now, last = GlobalState(self._device), self._last
        self.load_state_dict(self.state_dict())
        now.restore()
        if last is not None and self._last is not None and not _same(last, self._last):
            raise _not_repeated(self._name)

    def _begin(self) -> Iterator[Batch]:
        _suspend_walks(self._places, but=self)
        # Batches draws from its own generator alone, so the costlier global state can be left out.
        around = None if isinstance(self._loader, Batches) else GlobalState(self._device)
        self._start = _Start([g.get_state() for g in self._generators], around)
        self._consumed = 0
        iterator: Iterator[Batch] = iter(self._loader)
        self._iterator = iterator
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Return the position as tensors and plain values."""
        start = self._start
        return {
            "consumed": self._consumed,
            "generators": [g.get_state() for g in self._generators],
            "start_generators": None if start is None else start.generators,
            "start_global": start.around.state_dict() if start and start.around else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; leaves the global generators anywhere."""
        self._iterator, self._start, self._consumed = None, None, 0
        if state["start_generators"] is not None:
            if state["start_global"] is not None:
                around = GlobalState(self._device)
                around.load_state_dict(state["start_global"])
                around.restore()
            self._set_generators(state["start_generators"])
            iterator = self._begin()
            for self._consumed in range(1, state["consumed"] + 1):
                batch = next(iterator, _END)
                if batch is _END:
                    raise _not_repeated(self._name)
                if self._places:
                    self._last = _first_tensor(batch)
        self._set_generators(state["generators"])

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


class _Start(NamedTuple):
    """The random state when a pass began."""

    generators: list[Tensor]
    around: GlobalState | None


_END = object()
_walks: weakref.WeakSet[Cursor] = weakref.WeakSet()
"""Those over loaders whose passes may disturb each other."""


def _suspend_walks(places: set[int], *, but: Cursor | None = None) -> None:
    """Suspend the walks that a new pass may move."""
    if places:
        for walk in list(_walks):
            if walk is not but and walk._places & places:
                walk.suspend()


def _apart(loader: Loader) -> Loader:
    """Return the loader, or a copy whose workers are its own and begin anew with each pass.

    A `DataLoader` with persistent workers has one iterator, which every pass resets. Its workers
    keep their random numbers besides, so that no pass could be drawn again.
    """
    if isinstance(loader, data.DataLoader):
        change = {"persistent_workers": False, "_iterator": None}
        changes: dict[str, Any] = change if loader.persistent_workers else {}
    else:  # what wraps a DataLoader, to prefetch or to move batches
        inner = getattr(loader, "__dict__", {}).items()
        copies = {n: _apart(v) for n, v in inner if isinstance(v, data.DataLoader)}
        changes = {n: v for n, v in copies.items() if v is not vars(loader)[n]}
    if changes:
        loader = copy.copy(loader)
        vars(loader).update(changes)  # a DataLoader refuses to be set
    return loader


_SAMPLERS = (
    data.SequentialSampler,
    data.RandomSampler,
    data.SubsetRandomSampler,
    data.WeightedRandomSampler,
    data.BatchSampler,
)


def _places(loader: Loader) -> set[int]:
    """Return the identities of what may keep the position of a pass outside of its iterator."""
    if type(loader) in (Batches, list, tuple):
        return set()
    parts: list[Any] = []
    if isinstance(loader, data.DataLoader):
        batches = loader.batch_sampler
        samplers = (loader.sampler, batches, getattr(batches, "sampler", None))
        parts += [s for s in samplers if s is not None and type(s) not in _SAMPLERS]
        if isinstance(loader.dataset, data.IterableDataset):
            parts = [loader.dataset]
        if type(loader).__iter__ is not data.DataLoader.__iter__:
            parts.append(loader)
    else:
        plain = (str, bytes, list, tuple, dict, set, Tensor)
        inner = getattr(loader, "__dict__", {}).values()
        parts += [v for v in inner if hasattr(type(v), "__iter__") and not isinstance(v, plain)]
        parts.append(loader)
    return {id(part) for part in parts}


def _first_tensor(batch: Batch) -> Tensor | None:
    """Return a copy of a batch's first tensor."""
    return next((tensor.detach().clone() for tensor in tensors_of(batch)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())


def _not_repeated(name: str) -> UsageError:
    return UsageError(
        f"the {name} loader gives other batches when a pass is begun again from the same random "
        "numbers, so it can neither be measured in mid-walk nor resumed: let iter() start a pass "
        "at its first batch, in an order drawn from PyTorch's global generator or from the "
        "loader's attribute `generator`; got other batches"
    )


def reseed(loader: Loader, seed: int) -> None:
    """Let a loader that draws from generators of its own draw another order from now on."""
    for number, generator in enumerate(_generators(loader)):
        generator.manual_seed(seed + number)


def _generators(loader: Loader) -> list[torch.Generator]:
    """Return the generators that a loader, or the sampler inside a `DataLoader`, owns.

    What wraps a loader, to prefetch or to move batches, draws from those of the loader inside.
    """
    loaders: list[Any] = [loader]
    if not isinstance(loader, Batches | data.DataLoader):
        inner = getattr(loader, "__dict__", {}).values()
        loaders += [v for v in inner if isinstance(v, Batches | data.DataLoader)]
    owners = [owner for each in loaders for owner in (each, getattr(each, "sampler", None))]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))
