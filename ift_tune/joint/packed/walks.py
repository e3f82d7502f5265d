"""Walks that tell which rows come next, so that those of several runs are taken at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.joint.splits import Walks
from ift_tune.problem.batches import Batch, Batches, map_batch
from ift_tune.problem.problem import Splits


def _places_of(batches: Batches) -> Batches:
    """Return the batches of a loader as places in it: the same passes, from the same generator."""
    numbers = torch.arange(batches.size, device="cpu")
    places = Batches(numbers, batch_size=batches.batch_size, shuffle=batches.shuffle)
    places.generator = batches.generator
    return places


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
        super().__init__(Splits(**{name: _places_of(b) for name, b in self.data.items()}), device)
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
        (found,) = self._cursors[split].next()
        places: Tensor = found
        return places


def rows(batches: Batches, places: Tensor) -> Batch:
    """Return rows of a loader's data, as the loader yields them.

    Args:
        batches: The loader.
        places: Of the rows, shape (B,); or those of several batches, (P, B): then the tensors of
            the batch have a first dimension more.
    """
    flat = places.reshape(-1)

    def take(tensor: Tensor) -> Tensor:
        chosen = torch.index_select(tensor, 0, flat.to(tensor.device))
        return batches.noted(chosen.reshape(*places.shape, *tensor.shape[1:]), tensor)

    return as_yielded(map_batch(take, batches.tensors))


def whole(batches: Batches) -> Batch:
    """Return all rows."""
    return as_yielded(map_batch(lambda tensor: batches.noted(tensor, tensor), batches.tensors))


def as_yielded(batch: Any) -> Batch:
    """Return a mapping by itself, and not in a tuple of one."""
    return batch[0] if len(batch) == 1 and isinstance(batch[0], Mapping) else batch


class Gathered:
    """The batches of several members, of the same shapes.

    Attributes:
        batch: One batch that all of them have, or a stack of theirs.
        stacked: Whether it is a stack.
    """

    def __init__(self, batches: Batches, places: Tensor, *, same: bool) -> None:
        """Take the rows; those that are the same for all members once.

        Args:
            batches: The loader of one of them: all have the same data.
            places: Of each member, (P, B).
            same: Whether they are all the same.
        """
        self.stacked = not same
        if self.stacked:
            self.batch = rows(batches, places)
        elif batches.batch_size is None:
            self.batch = whole(batches)
        else:
            self.batch = rows(batches, places[0])

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
        longest = len(places[0])
        # Who is at its end repeats its last batch, which nobody takes.
        each = [torch.stack([*own, *[own[-1]] * (longest - len(own))]) for own in places]
        together = torch.stack(each, dim=1)
        if offsets is not None:
            together = together + offsets.unsqueeze(1)
        same = (together == together[:, :1]).all(dim=2).cumprod(dim=1)  # as the first, up to here
        self._same: list[list[int]] = same.cpu().tolist()
        self._places = together.to(batches.device)

    def at(self, step: int, members: int) -> Gathered:
        """Return the batches of the first members at a step."""
        chosen = self._places[step, :members]
        return Gathered(self._batches, chosen, same=bool(self._same[step][members - 1]))


def _row(member: int, tensor: Tensor) -> Tensor:
    return tensor[member]


def require_batches(splits: Splits) -> None:
    """Refuse loaders other than `Batches`: nobody else tells which rows come next.

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
