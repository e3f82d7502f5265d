"""Passes over loaders: once through for measuring, and an endless walk that can be resumed."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Generator, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data

from ift_tune.base.errors import UsageError
from ift_tune.base.generators import seed_generator
from ift_tune.base.randomness import GlobalState
from ift_tune.problem.batches import Batch, Batches, Loader
from ift_tune.problem.begun_again import known_again, other_batches, values_of
from ift_tune.problem.loader_parts import Sources, apart, generators_of, noting, places_of

_ENDLESS = 10_000  # batches of a pass over a loader that does not say how many it has


def once_through(loader: Loader) -> Generator[Batch, None, None]:
    """Yield each batch once, for measuring: no walk is moved, nor what the loader draws from."""
    if isinstance(loader, Batches):
        yield from loader.in_order()
        return
    _suspend_walks(places_of(loader))
    with Sources.of(loader).left_alone():  # at once: whoever wants but one batch leaves early
        yield from _ending(loader, apart(loader))


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
    loader whose order is drawn when a pass begins, as `Batches` and `DataLoader` do. The present
    states of the loader's own sources are saved as well, for others may draw from them too.

    So does a walk that was suspended, because another pass over the same loader began meanwhile and
    may have moved it: ``iter(loader)`` need not be independent of the one before.

    A loader may draw from what nobody sees. So of one that is not PyTorch's own the beginning of
    the pass is kept, and a pass that is started again must have the same examples there. Later
    batches would tell less: others draw between them, so that augmentation changes them.
    """

    def __init__(self, name: str, loader: Loader, device: torch.device) -> None:
        """Walk over `loader`; `name` is for errors, `device` for its random numbers."""
        self._name = name
        self._places = places_of(loader)
        self._loader, self._noted = noting(apart(loader)) if self._places else (apart(loader), None)
        self._device = device
        self._sources = Sources.of(loader)
        self._iterator: Iterator[Batch] | None = None
        self._start: _Start | None = None
        self._consumed = 0
        self._beginning: list[Tensor] | None = None
        if self._places:
            _walks.add(self)

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            UsageError: If the loader yields none.
            OtherBatchesError: If another pass has moved it, and it cannot be begun again.
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
            self._note(batch)
            return batch

    def suspend(self) -> None:
        """Let go of the loader's iterator and its workers; `next` finds the place again."""
        self._iterator = None

    def _find_place(self) -> None:
        now = GlobalState(self._device)
        self.load_state_dict(self.state_dict())
        now.restore()

    def _begin(self) -> Iterator[Batch]:
        _suspend_walks(self._places, but=self)
        # Batches draws from its own generator alone, so the costlier global state can be left out.
        around = None if isinstance(self._loader, Batches) else GlobalState(self._device)
        self._start = _Start(self._sources.states(), around)
        self._consumed, self._beginning = 0, None
        iterator: Iterator[Batch] = iter(self._loader)
        self._iterator = iterator
        return iterator

    def _note(self, batch: Batch) -> None:
        """Keep how the pass begins, or hold it against what is known of that."""
        if self._consumed > 1 or not self._places:
            return
        drawn = None if self._noted is None else self._noted.first()
        beginning = values_of(batch if drawn is None else drawn)
        if self._beginning is None:
            self._beginning = beginning
        elif not known_again(self._beginning, beginning):
            self.suspend()
            raise other_batches(self._name)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as tensors and plain values."""
        start = self._start
        return {
            "consumed": self._consumed,
            "beginning": self._beginning,
            **self._sources.states(),
            "start_generators": None if start is None else start.sources["generators"],
            "start_counts": None if start is None else start.sources["counts"],
            "start_global": start.around.state_dict() if start and start.around else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; leaves the global generators anywhere.

        Raises:
            OtherBatchesError: If the loader does not begin the pass as it did.
        """
        self._iterator, self._start, self._consumed = None, None, 0
        sources = self._sources
        if "beginning" not in state:  # of an earlier version
            sources = sources.seen_formerly(len(state["generators"]))
        if state["start_generators"] is not None:
            if state["start_global"] is not None:
                around = GlobalState(self._device)
                around.load_state_dict(state["start_global"])
                around.restore()
            kept = ("generators", "counts")  # the latter not in checkpoints of earlier versions
            sources.put_back({n: state[f"start_{n}"] for n in kept if f"start_{n}" in state})
            iterator = self._begin()
            self._beginning = state.get("beginning")
            for self._consumed in range(1, state["consumed"] + 1):
                batch = next(iterator, _END)
                if batch is _END:
                    raise other_batches(self._name)
                self._note(batch)
        sources.put_back(state)


class _Start(NamedTuple):
    """The random state when a pass began."""

    sources: dict[str, list[Any]]
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


def reseed(loader: Loader, seed: int) -> None:
    """Let a loader that draws from generators of its own draw another order from now on."""
    for number, generator in enumerate(generators_of(loader)):
        seed_generator(generator, (seed + number) % 2**32)  # the most that NumPy takes
