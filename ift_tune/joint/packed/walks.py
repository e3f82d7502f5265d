"""Walks that tell which rows come next, so that those of several runs are taken at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.joint.splits import Walks
from ift_tune.problem.batches import Batch, Batches, map_batch, tensors_of
from ift_tune.problem.problem import Splits

_AT_ONCE, _BYTES = 16, 2**22
"""The most batches whose rows are taken together, and the most bytes of them: what is larger is not
held back by the number of operations."""


class _Places(Batches):
    """The batches of a loader as places in it: the same passes, from the same generator."""

    def __init__(self, batches: Batches) -> None:
        numbers = torch.arange(batches.size, device="cpu")
        super().__init__(numbers, batch_size=batches.batch_size, shuffle=batches.shuffle)
        self.generator = batches.generator

    def __iter__(self) -> Iterator[Tensor]:
        return self.places()


class PlacedWalks(Walks):
    """Walks over `Batches` alone, whose state is that of the ordinary ones.

    Attributes:
        data: The loaders of the splits.
        ready: Batches that were taken beforehand, each for one call of `next`.
    """

    def __init__(self, splits: Splits, device: torch.device) -> None:
        """Begin all walks."""
        self.data: dict[str, Batches] = {
            f.name: batches
            for f in fields(splits)
            if (batches := getattr(splits, f.name)) is not None
        }
        super().__init__(Splits(**{name: _Places(b) for name, b in self.data.items()}), device)
        self.ready: dict[str, list[Batch]] = {}
        self._taken: list[tuple[str, Tensor]] = []
        self._returned: dict[str, list[Tensor]] = {}

    def next(self, split: str) -> Batch:
        """Return the next batch of a split."""
        waiting = self.ready.get(split)
        batch = waiting.pop(0) if waiting else rows(self.data[split], self._next_places(split))
        self.watch(batch)
        return batch

    def places(self, split: str) -> Tensor:
        """Return where the rows of the next batch are, and go past it."""
        places = self._next_places(split)
        self._taken.append((split, places))
        return places

    def settle(self) -> None:
        """Note that the places taken so far have been used."""
        self._taken.clear()

    def give_back(self) -> None:
        """Take the places back that have not been used: they come again, as if never taken."""
        self.ready.clear()
        for split, places in self._taken:
            self._returned.setdefault(split, []).append(places)
        self._taken.clear()

    def _next_places(self, split: str) -> Tensor:
        if returned := self._returned.get(split):
            return returned.pop(0)
        places: Tensor = self._cursors[split].next()
        return places


def rows(batches: Batches, places: Tensor) -> Batch:
    """Return rows of a loader's data, as the loader yields them.

    Args:
        batches: The loader.
        places: Of the rows, shape (B,).
    """

    def take(tensor: Tensor) -> Tensor:
        return batches.noted(tensor.index_select(0, places.to(tensor.device)), tensor)

    return as_yielded(map_batch(take, batches.tensors))


def whole(batches: Batches) -> Batch:
    """Return all rows."""
    return as_yielded(map_batch(lambda tensor: batches.noted(tensor, tensor), batches.tensors))


def as_yielded(batch: Any) -> Batch:
    """Return a mapping by itself, and not in a tuple of one."""
    return batch[0] if len(batch) == 1 and isinstance(batch[0], Mapping) else batch


class Gathered(NamedTuple):
    """The batches of several members, of the same shapes.

    Attributes:
        batch: One batch that all of them have, or a stack of theirs.
        stacked: Whether it is a stack.
    """

    batch: Batch
    stacked: bool

    def of(self, member: int) -> Batch:
        """Return the batch of one member."""
        return map_batch(partial(_row, member), self.batch) if self.stacked else self.batch


class Course:
    """The batches of several members over many steps; those with more steps come first."""

    def __init__(
        self,
        batches: Batches,
        places: Sequence[Sequence[Tensor]],
        offsets: Tensor | None = None,
    ) -> None:
        """Take the places of all steps to the device at once.

        Args:
            batches: The loader of one of them.
            places: Of each member, one for each of its steps.
            offsets: Where the rows of each begin in the loader; None: at the first.
        """
        self._batches = batches
        # Who is at its end goes on with the batches of the first, which nobody takes.
        each = [[*own, *places[0][len(own) :]] for own in places]
        together = torch.stack([at for own in each for at in own])
        together = together.view(len(each), len(each[0]), -1).transpose(0, 1)
        if offsets is not None:
            together = together + offsets.unsqueeze(1)
        same = (together == together[:, :1]).all(dim=2).cumprod(dim=1)  # as the first, up to here
        self._same: list[list[int]] = same.cpu().tolist()
        self._places = together.to(batches.device)
        self._taken, self._rows = range(0), list[Tensor]()  # of which steps, for each tensor

    def at(self, step: int, members: int) -> Gathered:
        """Return the batches of the first members at a step."""
        batches, same = self._batches, bool(self._same[step][members - 1])
        if same and batches.batch_size is None:
            return Gathered(whole(batches), stacked=False)
        if step not in self._taken:
            self._take(step)
        # All have the rows of the first: then a member is none of the dimensions.
        chosen = 0 if same else slice(members)
        each = iter([rows[step - self._taken.start, chosen] for rows in self._rows])
        found = map_batch(lambda tensor: batches.noted(next(each), tensor), batches.tensors)
        return Gathered(as_yielded(found), stacked=not same)

    def _take(self, step: int) -> None:
        """Take the rows of the next steps together."""
        tensors = tensors_of(self._batches.tensors)
        different = 1 if all(row[-1] for row in self._same[step:]) else self._places.shape[1]
        bytes_ = sum(t[:1].nbytes for t in tensors) * different * self._places.shape[2]
        steps = min(_AT_ONCE, max(1, _BYTES // max(bytes_, 1)), len(self._places) - step)
        places = self._places[step : step + steps, :different]
        flat = places.reshape(-1)
        self._taken = range(step, step + steps)
        self._rows = [t.index_select(0, flat).view(*places.shape, *t.shape[1:]) for t in tensors]


def _row(member: int, tensor: Tensor) -> Tensor:
    return tensor[member]


_WALKED = ("train", "curvature", "val")  # the splits whose batches are taken one by one


def require_batches(splits: Splits) -> None:
    """Refuse loaders other than `Batches`, as nobody else tells which rows come next.

    And those whose passes end in a smaller batch.

    Raises:
        UsageError: If there is one; it is named.
    """
    for field in fields(splits):
        loader = getattr(splits, field.name)
        if loader is not None and type(loader) is not Batches:
            raise UsageError(
                f"a pack takes its batches from tensors in memory: give ift_tune.Batches or "
                f"Splits.from_arrays, or leave --pack off; got a {type(loader).__name__} for "
                f"Splits.{field.name}"
            )
        if loader is None or loader.shuffle or field.name not in _WALKED:
            continue
        if rest := loader.size % (loader.batch_size or loader.size):
            raise UsageError(
                f"a pack takes batches of one size: shuffle them, or let batch_size of "
                f"Splits.{field.name} divide its {loader.size} examples, or leave --pack off; got "
                f"a last batch of {rest}"
            )
