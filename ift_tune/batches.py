"""Batches from memory, and an endless walk over any loader that can be saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ift_tune.errors import UsageError
from ift_tune.randomness import GlobalState
from ift_tune.types import Batch, Loader


class Batches:
    """A loader over tensors in memory, on their device: no workers, no collation, no copies.

    Iterating yields tuples of rows, one permutation a pass. A pass that does not divide evenly
    drops its rest, like ``DataLoader(drop_last=True)``; the next permutation brings other examples.
    """

    def __init__(self, *tensors: Tensor, batch_size: int | None = None, seed: int = 0) -> None:
        """Take the tensors.

        Args:
            tensors: Of equal first dimension N, on one device.
            batch_size: Examples a batch, at most N; None gives all in one batch, unshuffled.
            seed: Of the permutations.

        Raises:
            UsageError: If the sizes do not agree.
        """
        sizes = {t.shape[0] for t in tensors}
        if len(sizes) != 1 or 0 in sizes:
            raise UsageError(f"tensors need one common, positive first dimension, got {sizes}")
        self.tensors = tensors
        self.size = sizes.pop()
        if batch_size is not None and not 1 <= batch_size <= self.size:
            raise UsageError(f"batch_size must be in 1..{self.size}, got {batch_size}")
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Start a pass."""
        if self.batch_size is None:
            yield self.tensors
            return
        order = torch.randperm(self.size, generator=self.generator)
        order = order.to(self.tensors[0].device)
        for start in range(0, self.size - self.batch_size + 1, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield tuple(t.index_select(0, chosen) for t in self.tensors)


class Cursor:
    """An endless walk over a loader, pass after pass, whose position can be saved.

    A saved position is the random state at the start of the pass and the number of batches since:
    a resumed walk starts the pass again with that state and skips so many. That is exact for any
    loader whose order is drawn when a pass begins, as `Batches` and `DataLoader` do.
    """

    def __init__(self, name: str, loader: Loader, device: torch.device) -> None:
        """Walk over `loader`; `name` is for errors, `device` for its random numbers."""
        self._name = name
        self._loader = loader
        self._device = device
        self._generator: torch.Generator | None = getattr(loader, "generator", None)
        self._iterator: Iterator[Batch] | None = None
        self._start: dict[str, Any] = {}
        self._consumed = 0

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            UsageError: If the loader yields none.
        """
        if self._iterator is None:
            self._begin()
        while True:
            try:
                batch = next(self._iterator)  # type: ignore[arg-type]
            except StopIteration:
                if self._consumed == 0:
                    raise UsageError(f"the {self._name} loader yields no batch") from None
                self._begin()
                continue
            self._consumed += 1
            return batch

    def _begin(self) -> None:
        if self._generator is not None:
            self._start = {"generator": self._generator.get_state()}
        else:
            self._start = {"global": GlobalState(self._device)}
        self._iterator = iter(self._loader)
        self._consumed = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as tensors and plain values."""
        start = {
            key: value.state_dict() if isinstance(value, GlobalState) else value
            for key, value in self._start.items()
        }
        return {"start": start, "consumed": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; leaves the global generators as they were at its pass's start."""
        self._iterator, self._consumed = None, 0
        if not state["start"]:
            return
        if self._generator is not None:
            self._generator.set_state(state["start"]["generator"])
        else:
            begin = GlobalState(self._device)
            begin.load_state_dict(state["start"]["global"])
            begin.restore()
        self._begin()
        for _ in range(state["consumed"]):
            self.next()
