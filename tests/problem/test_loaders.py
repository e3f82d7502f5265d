"""Passes over one loader do not move each other, whatever iter(loader) returns."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from ift_tune import UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.problem.batches import Batches, Loader
from ift_tune.problem.loaders import Cursor, once_through

CPU = torch.device("cpu")
SIZE = 7
DATA = TensorDataset(torch.arange(SIZE))


class OnePosition:
    """A loader whose position is its own: a new pass moves the one before."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.at, self.order = 0, torch.randperm(SIZE)
        while self.at < SIZE:
            self.at += 1
            yield self.order[self.at - 1 : self.at]


class Wrapped:
    """Hands out the one iterator of another, as a prefetcher may."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


class OneStream(IterableDataset[Any]):
    """A data set that is its own iterator."""

    def __iter__(self) -> OneStream:
        self.rest = list(range(SIZE))
        return self

    def __next__(self) -> int:
        if not self.rest:
            raise StopIteration
        return self.rest.pop(0)


class OneOrder(Sampler[int]):
    """A sampler whose rest is its own."""

    def __iter__(self) -> Iterator[int]:
        self.rest = torch.randperm(SIZE).tolist()
        while self.rest:
            yield self.rest.pop()


class Running:
    """A stream that no pass begins anew."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(SIZE):
            self.count += 1
            yield torch.tensor([self.count])


def workers(persistent: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=2, num_workers=1, persistent_workers=persistent, **options)


LOADERS: dict[str, Callable[[], Loader]] = {
    "persistent workers": lambda: workers(shuffle=True),
    "persistent workers, own generator": lambda: workers(
        shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "wrapped persistent workers": lambda: Wrapped(workers(shuffle=True)),
    "with replacement": lambda: DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)),
    "one position": OnePosition,
    "wrapped, own generator": lambda: Wrapped(
        DataLoader(DATA, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(6))
    ),
    "wrapped batches": lambda: Wrapped(Batches(torch.arange(SIZE), batch_size=1, seed=4)),
    "wrapped one position": lambda: Wrapped(OnePosition()),
    "one stream": lambda: DataLoader(OneStream(), batch_size=2),
    "one order": lambda: DataLoader(DATA, batch_size=2, sampler=OneOrder()),
    "list": lambda: [torch.tensor([0, 1]), torch.tensor([2])],
}


def plain(batch: Any) -> list[int]:
    found: list[int] = (batch[0] if isinstance(batch, list | tuple) else batch).tolist()
    return found


def take(cursor: Cursor, stream: RandomStream, count: int) -> list[list[int]]:
    with stream.active():
        found = [plain(cursor.next()) for _ in range(count)]
        torch.rand(2)
    return found


@pytest.mark.parametrize("kind", sorted(LOADERS))
def test_measuring_does_not_move_a_walk(kind: str) -> None:
    walks = {}
    for measured in (False, True):
        loader, stream = LOADERS[kind](), RandomStream(1, CPU)
        cursor, drawn = Cursor("train", loader, CPU), []
        for count in (2, 1, 6):
            drawn += take(cursor, stream, count)
            if measured:
                with stream.aside():
                    whole = sorted(n for batch in once_through(loader) for n in plain(batch))
                    next(once_through(loader))  # and one that is left early
                assert len(whole) in (3, SIZE)
        walks[measured] = drawn
    assert walks[True] == walks[False]


@pytest.mark.parametrize("kind", sorted(LOADERS))
def test_a_walk_that_was_measured_is_resumed_exactly(kind: str) -> None:
    loader, stream = LOADERS[kind](), RandomStream(1, CPU)
    cursor = Cursor("train", loader, CPU)
    take(cursor, stream, 5)
    with stream.aside():
        list(once_through(loader))
    position, numbers = cursor.state_dict(), stream.state_dict()
    expected = take(cursor, stream, 6)
    again, other = Cursor("train", LOADERS[kind](), CPU), RandomStream(2, CPU)
    with other.active():
        again.load_state_dict(position)
    other.load_state_dict(numbers)
    assert take(again, other, 6) == expected


@pytest.mark.parametrize("kind", ["persistent workers", "one position", "one stream"])
def test_one_loader_serves_two_walks(kind: str) -> None:
    alone = take(Cursor("train", LOADERS[kind](), CPU), RandomStream(1, CPU), 5)
    loader, stream = LOADERS[kind](), RandomStream(1, CPU)
    train, val = Cursor("train", loader, CPU), Cursor("val", loader, CPU)
    together = []
    for _ in range(5):
        with stream.active():
            together.append(plain(train.next()))
        take(val, RandomStream(3, CPU), 1)
    if kind != "one stream":  # the others draw their order when a pass begins: compare the first
        together, alone = together[:3], alone[:3]
    assert together == alone


def test_a_loader_that_cannot_be_begun_again_is_named() -> None:
    loader = Running()
    cursor = Cursor("train", loader, CPU)
    cursor.next()
    next(once_through(loader))
    with pytest.raises(UsageError, match="the train loader gives other batches"):
        cursor.next()


def test_workers_end_with_the_walk_and_the_users_loader_is_left_alone() -> None:
    loader = workers()
    before = set(multiprocessing.active_children())
    cursor, stream = Cursor("train", loader, CPU), RandomStream(1, CPU)
    first = take(cursor, stream, 2)
    assert len(set(multiprocessing.active_children()) - before) == 1
    cursor.suspend()
    list(once_through(loader))
    assert set(multiprocessing.active_children()) <= before
    assert loader.persistent_workers
    assert loader._iterator is None
    assert first + take(cursor, stream, 2) == [[0, 1], [2, 3], [4, 5], [6]]
    cursor.suspend()


def _two_of_one_sampler() -> list[Loader]:
    sampler = BatchSampler(OneOrder(), 2, drop_last=False)
    return [Wrapped(DataLoader(DATA, batch_sampler=sampler)) for _ in range(2)]


def _two_of_one_loader() -> list[Loader]:
    inner = OnePosition()
    return [Wrapped(Wrapped(inner)), Wrapped(inner)]


@pytest.mark.parametrize("make", [_two_of_one_sampler, _two_of_one_loader])
def test_a_position_in_common_is_seen_however_deep(make: Callable[[], list[Loader]]) -> None:
    alone = take(Cursor("train", make()[0], CPU), RandomStream(1, CPU), 3)
    stream = RandomStream(1, CPU)
    train, val = (Cursor("split", loader, CPU) for loader in make())
    together = []
    for _ in range(3):
        together += take(train, stream, 1)
        take(val, RandomStream(3, CPU), 1)
    assert together == alone


class Reading:
    """A loader over data that others read too, in an order that nobody can begin again."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.draw, self.made = rows, np.random.default_rng(1).permutation, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for row in self.draw(SIZE):
            self.made += 1
            yield torch.tensor([row])


IN_COMMON: dict[str, Any] = {
    "array": np.arange(SIZE),
    "frame": pd.DataFrame({"x": range(SIZE)}),
    "series": pd.Series(range(SIZE)),
    "tensor": torch.arange(SIZE),
    "list": list(range(SIZE)),
    "mapping": {"x": np.arange(SIZE)},
    "set": set(range(SIZE)),
    "data set": DATA,
}


@pytest.mark.parametrize("kind", sorted(IN_COMMON))
def test_loaders_with_data_in_common_do_not_begin_again_for_each_other(kind: str) -> None:
    loaders = [Reading(IN_COMMON[kind]) for _ in range(2)]
    cursors = [Cursor("train", loader, CPU) for loader in loaders]
    for _ in range(10):
        for cursor in cursors:
            cursor.next()
    assert [loader.made for loader in loaders] == [10, 10]
