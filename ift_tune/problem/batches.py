"""Batches: sizes and devices, loaders from memory, an endless walk that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState

Batch: TypeAlias = Any
"""Whatever a loader yields: a tensor, or a tuple, list or dict of them."""


@runtime_checkable
class Loader(Protocol):
    """Anything that can be iterated over again and again: a `DataLoader`, a list, `Batches`."""

    def __iter__(self) -> Any:
        """Start one pass over the split."""


def batch_size(batch: Batch) -> int:
    """Return the number of examples of a batch: the first dimension of its first tensor.

    Raises:
        UsageError: If the batch holds no tensor.
    """
    for leaf in _leaves(batch):
        return leaf.shape[0] if leaf.ndim else 1
    raise UsageError(f"a batch must hold at least one tensor, got {type(batch).__name__}")


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return the batch with `function` applied to every tensor, its structure kept."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_batch(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_batch(function, value) for value in batch)
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`; the same tensors where they are already."""
    return map_batch(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _leaves(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)


class Batches:
    """A loader over tensors in memory, on their device: no workers, no collation, no copies.

    Iterating yields tuples of rows, one permutation a pass. A pass that does not divide evenly
    drops its rest, like ``DataLoader(drop_last=True)``; the next permutation brings other examples.

    Example:
        >>> import torch, ift_tune
        >>> batches = ift_tune.Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [[tuple(t.shape) for t in batch] for batch in batches]
        [[(2,), (2,)], [(2,), (2,)]]
        >>> [targets.tolist() for _, targets in batches.in_order()]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, *tensors: Tensor, batch_size: int | None = None, seed: int = 0) -> None:
        """Take the tensors.

        Args:
            tensors: Each of shape (N, ...), on one device.
            batch_size: Examples a batch, at most N; None gives all in one batch, unshuffled.
            seed: Of the permutations.

        Raises:
            UsageError: If the sizes do not agree.
        """
        sizes = {t.shape[0] if t.ndim else 0 for t in tensors}
        if len(sizes) != 1 or 0 in sizes:
            raise UsageError(f"tensors need one common, positive first dimension, got {sizes}")
        self.tensors = tensors
        self.size = sizes.pop()
        if batch_size is not None and batch_size not in range(1, self.size + 1):
            raise UsageError(f"batch_size must be in 1..{self.size}, got {batch_size}")
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Start a pass."""
        if self.batch_size is None:
            yield self.tensors
            return
        # On the CPU, so that the order is the same wherever the tensors are.
        order = torch.randperm(self.size, generator=self.generator)
        order = order.to(self.tensors[0].device)
        for start in range(0, self.size - self.batch_size + 1, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield tuple(t.index_select(0, chosen) for t in self.tensors)

    def in_order(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield all rows in their order, the last batch smaller where it must be."""
        step = self.batch_size or self.size
        for start in range(0, self.size, step):
            yield tuple(t[start : start + step] for t in self.tensors)


def once_through(loader: Loader) -> Generator[Batch, None, None]:
    """Yield each batch once, for measuring: the loader's own generators stay where they are."""
    if isinstance(loader, Batches):
        yield from loader.in_order()
        return
    generators = _generators(loader)
    before = [g.get_state() for g in generators]
    try:
        yield from loader
    finally:  # whoever wants but one batch leaves early
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


class Cursor:
    """An endless walk over a loader, pass after pass, whose position can be saved.

    A saved position is the random state at the start of the pass and the number of batches since:
    a resumed walk starts the pass again with that state and skips so many. That is exact for any
    loader whose order is drawn when a pass begins, as `Batches` and `DataLoader` do. The states
    of the loader's own generators are saved as well, for others may draw from them too.
    """

    def __init__(self, name: str, loader: Loader, device: torch.device) -> None:
        """Walk over `loader`; `name` is for errors, `device` for its random numbers."""
        self._name = name
        self._loader = loader
        self._device = device
        self._generators = _generators(loader)
        self._iterator: Iterator[Batch] | None = None
        self._start: _Start | None = None
        self._consumed = 0

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            UsageError: If the loader yields none.
        """
        iterator = self._iterator or self._begin()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                if self._consumed == 0:
                    raise UsageError(f"the {self._name} loader yields no batch") from None
                iterator = self._begin()
                continue
            self._consumed += 1
            return batch

    def _begin(self) -> Iterator[Batch]:
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
            self._begin()
            for _ in range(state["consumed"]):
                self.next()
        self._set_generators(state["generators"])

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


class _Start(NamedTuple):
    """The random state when a pass began."""

    generators: list[Tensor]
    around: GlobalState | None


def _generators(loader: Loader) -> list[torch.Generator]:
    """Return the generators that a loader, or the sampler inside a `DataLoader`, owns."""
    owners = (loader, getattr(loader, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))
