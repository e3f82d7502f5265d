"""What a loader draws from is seen wherever it is, and other batches are told where it is not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from ift_tune import UsageError
from ift_tune.base.checkpoints import load_checkpoint, save_checkpoint
from ift_tune.base.randomness import RandomStream
from ift_tune.problem.batches import Loader
from ift_tune.problem.begun_again import begins_again
from ift_tune.problem.loaders import Cursor, once_through, reseed

CPU = torch.device("cpu")
SIZE = 12
DATA = TensorDataset(torch.arange(SIZE))

GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy, another kind": lambda: np.random.Generator(np.random.SFC64(3)),
    "numpy, old": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}


def order_of(generator: Any) -> list[int]:
    if isinstance(generator, torch.Generator):
        return torch.randperm(SIZE, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return generator.sample(range(SIZE), SIZE)
    found: list[int] = generator.permutation(SIZE).tolist()
    return found


class Order(Sampler[int]):
    """A sampler whose generator has a name of its own."""

    def __init__(self, generator: Any) -> None:
        self.source_of_order = generator

    def __iter__(self) -> Iterator[int]:
        return iter(order_of(self.source_of_order))


class Groups(Sampler[list[int]]):
    """A sampler of batches with a generator."""

    def __init__(self, generator: Any) -> None:
        self.mine = generator

    def __iter__(self) -> Iterator[list[int]]:
        order = order_of(self.mine)
        yield from (order[at : at + 3] for at in range(0, SIZE, 3))


class Stream(IterableDataset[int]):
    """A data set that draws its order."""

    def __init__(self, generator: Any) -> None:
        self.mine = generator

    def __iter__(self) -> Iterator[int]:
        return iter(order_of(self.mine))


class Own:
    """A loader of one's own, with a generator or a function that hides one."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[Any]:
        order = self.draw() if callable(self.draw) else order_of(self.draw)
        for at in range(0, SIZE, 3):
            yield torch.tensor(order[at : at + 3])


class Wrapped:
    """What moves the batches of another."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner


class Noisy(Dataset[Any]):
    """Augmentation that makes something else of an example each time."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.noise = noise

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.tensor([float(self.noise())]), place

    def __len__(self) -> int:
        return SIZE


def grouped(generator: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_sampler=BatchSampler(Order(generator), 3, False))


SHAPES: dict[str, Callable[[Any], Loader]] = {
    "sampler": lambda g: DataLoader(DATA, batch_size=3, sampler=Order(g)),
    "sampler of a batch sampler": grouped,
    "batch sampler": lambda g: DataLoader(DATA, batch_sampler=Groups(g)),
    "stream": lambda g: DataLoader(Stream(g), batch_size=3),
    "own": Own,
    "wrapped": lambda g: Wrapped(grouped(g)),
    "wrapped twice": lambda g: Wrapped(Wrapped(Own(g))),
}


def numbers(batch: Any) -> list[float]:
    found: list[float] = (batch[-1] if isinstance(batch, list | tuple) else batch).tolist()
    return found


def take(cursor: Cursor, stream: RandomStream, count: int) -> list[Any]:
    """Return some batches, others drawing from the same numbers between them."""
    found = []
    with stream.active():
        for _ in range(count):
            found.append(numbers(cursor.next()))
            torch.rand(2)
    return found


def resumed(cursor: Cursor, stream: RandomStream, loader: Loader, path: Path) -> list[Any]:
    """Return six batches of a walk that is saved here and goes on in another process's loader."""
    save_checkpoint(path, {"c": cursor.state_dict(), "s": stream.state_dict()})
    state = load_checkpoint(path)
    again, other = Cursor("train", loader, CPU), RandomStream(2, CPU)
    with other.active():
        again.load_state_dict(state["c"])
    other.load_state_dict(state["s"])
    return take(again, other, 6)


def sizes(loader: Loader) -> list[float]:
    return sorted(n for batch in once_through(loader) for n in numbers(batch))


@pytest.mark.parametrize("generator", sorted(GENERATORS))
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_generator_is_seen_wherever_it_is(shape: str, generator: str, tmp_path: Path) -> None:
    def make() -> Loader:
        return SHAPES[shape](GENERATORS[generator]())

    alone = take(Cursor("train", make(), CPU), RandomStream(1, CPU), 13)
    loader, stream = make(), RandomStream(1, CPU)
    cursor = Cursor("train", loader, CPU)
    first = take(cursor, stream, 7)
    with stream.aside():
        assert sizes(loader) == list(range(SIZE))  # measuring moves nothing
    found = resumed(cursor, stream, make(), tmp_path / "c.pt")
    assert first + found == alone
    assert first + take(cursor, stream, 6) == alone
    other = make()
    reseed(other, 11)
    assert take(Cursor("train", other, CPU), RandomStream(1, CPU), 4) != alone[:4]


def test_a_generator_of_pytorchs_sampler_inside_a_batch_sampler_is_seen(tmp_path: Path) -> None:
    def make() -> Loader:
        sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(5))
        return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 3, False))

    cursor, stream = Cursor("train", make(), CPU), RandomStream(1, CPU)
    take(cursor, stream, 6)
    found = resumed(cursor, stream, make(), tmp_path / "c.pt")
    assert found == take(cursor, stream, 6)


class Counting(Sampler[int]):
    """A sampler that seeds a generator with the number of its passes; `epoch` is not its only one.

    Truth values and words are settings.
    """

    def __init__(self) -> None:
        self.epoch, self.shuffle, self.name = 0, True, "epochs"

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(order_of(random.Random(self.epoch)))


COUNTING: dict[str, Callable[[Any], Loader]] = {
    "sampler": lambda s: DataLoader(DATA, 3, sampler=s),
    "sampler, workers": lambda s: DataLoader(DATA, 3, sampler=s, num_workers=1),
    "batch sampler": lambda s: DataLoader(DATA, batch_sampler=BatchSampler(s, 3, False)),
    "wrapped": lambda s: Wrapped(DataLoader(DATA, 3, sampler=s)),
}


@pytest.mark.parametrize("shape", sorted(COUNTING))
def test_what_a_sampler_counts_is_put_back(shape: str, tmp_path: Path) -> None:
    alone = take(Cursor("train", COUNTING[shape](Counting()), CPU), RandomStream(1, CPU), 13)
    sampler, stream = Counting(), RandomStream(1, CPU)
    loader = COUNTING[shape](sampler)
    cursor = Cursor("train", loader, CPU)
    first = take(cursor, stream, 7)
    before = dict(vars(sampler))
    assert before["epoch"] >= 2
    with stream.aside():
        assert begins_again(loader, CPU)
        assert sizes(loader) == list(range(SIZE))  # measuring moves nothing
    assert vars(sampler) == before
    found = resumed(cursor, stream, COUNTING[shape](Counting()), tmp_path / "c.pt")
    assert first + found == alone
    assert first + take(cursor, stream, 6) == alone
    cursor.suspend()


def test_a_walk_over_a_sampler_that_others_have_moved_is_resumed(tmp_path: Path) -> None:
    loader, stream = DataLoader(DATA, 3, sampler=Counting()), RandomStream(1, CPU)
    take(Cursor("train", loader, CPU), stream, 10)  # of an earlier trial, as with a global loader
    cursor = Cursor("train", loader, CPU)
    take(cursor, stream, 2)
    fresh = DataLoader(DATA, 3, sampler=Counting())
    assert resumed(cursor, stream, fresh, tmp_path / "c.pt") == take(cursor, stream, 6)


def test_counts_of_loaders_and_data_sets_are_left_alone() -> None:
    loader, data = Own(lambda: list(range(SIZE))), Noisy(random.random)
    parts: list[Any] = [loader, data]
    for part in parts:
        part.made = 0
    cursors = [Cursor("train", each, CPU) for each in (loader, DataLoader(data, 3, shuffle=True))]
    states = [cursor.state_dict() for cursor in cursors]
    for part in parts:
        part.made = 5
    for cursor, state in zip(cursors, states, strict=True):
        cursor.load_state_dict(state)
    assert [part.made for part in parts] == [5, 5]


def hidden() -> Callable[[], list[int]]:
    generator = torch.Generator().manual_seed(3)
    return lambda: order_of(generator)


OUT_OF_SIGHT: dict[str, Callable[[], Loader]] = {
    "sampler": lambda: DataLoader(Noisy(random.random), batch_size=3, sampler=Hidden(hidden())),
    "batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(Hidden(hidden()), 3, False)
    ),
    "own": lambda: Own(hidden()),
    "wrapped": lambda: Wrapped(Own(hidden())),
}


class Hidden(Order):
    """A sampler whose generator nobody finds."""

    def __iter__(self) -> Iterator[int]:
        return iter(self.source_of_order())


class Costly(Dataset[Any]):
    """Data that must not be loaded for nothing."""

    def __getitem__(self, place: int) -> Any:
        raise AssertionError("an example was loaded")

    def __len__(self) -> int:
        return SIZE


def everybodys() -> list[int]:
    return random.sample(range(SIZE), SIZE)


def drawing() -> list[int]:
    return order_of(np.random.default_rng())


BEGUN: dict[str, tuple[Callable[[], Loader], bool]] = {
    "list": (lambda: [torch.arange(3)], True),
    "shuffled": (lambda: DataLoader(Costly(), 3, shuffle=True), True),
    "generator": (lambda: DataLoader(Costly(), 3, sampler=Order(seeded())), True),
    "counting": (lambda: DataLoader(Costly(), 3, sampler=Counting()), True),
    "global": (lambda: DataLoader(Costly(), 3, sampler=Hidden(everybodys)), True),
    "nothing drawn": (lambda: DataLoader(Costly(), 3, sampler=Hidden(list)), True),
    "entropy": (lambda: DataLoader(Costly(), 3, sampler=Hidden(drawing)), False),
    "entropy, workers": (
        lambda: DataLoader(Costly(), 3, sampler=Hidden(drawing), num_workers=2),
        False,
    ),
    "out of sight": (lambda: DataLoader(Costly(), None, sampler=Hidden(hidden())), False),
    "own, of which nothing is known": (lambda: Own(hidden()), True),
}


@pytest.mark.parametrize("kind", sorted(BEGUN))
def test_whether_a_pass_can_be_begun_again_is_seen_without_loading(kind: str) -> None:
    make, expected = BEGUN[kind]
    loader, stream = make(), RandomStream(1, CPU)
    before = stream.state_dict()
    with stream.active():
        assert begins_again(loader, CPU) is expected
    after = RandomStream(2, CPU)
    after.load_state_dict(before)
    with stream.active():
        drawn = torch.rand(1), random.random()
    with after.active():
        assert (torch.rand(1), random.random()) == drawn  # nothing of the run's numbers was used


@pytest.mark.parametrize("kind", sorted(OUT_OF_SIGHT))
def test_other_batches_are_told_when_a_walk_is_restored(kind: str, tmp_path: Path) -> None:
    cursor, stream = Cursor("train", OUT_OF_SIGHT[kind](), CPU), RandomStream(1, CPU)
    take(cursor, stream, 6)
    with pytest.raises(UsageError, match=r"the train loader gives other batches .* attribute"):
        resumed(cursor, stream, OUT_OF_SIGHT[kind](), tmp_path / "c.pt")


class Augmenting:
    """A loader of one's own that augments with the numbers of the run."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(SIZE)
        for at in range(0, SIZE, 3):
            yield torch.randn(3), order[at : at + 3]


class Unlabelled(IterableDataset[Any]):
    """A stream that augments with the numbers of the run, and has nothing else."""

    def __iter__(self) -> Iterator[Tensor]:
        for place in range(SIZE):
            yield place + 0.1 * torch.rand(1)


def entropy() -> float:
    return np.random.default_rng().random()


AUGMENTED: dict[str, Callable[[], Loader]] = {
    "the run's numbers": lambda: DataLoader(Noisy(random.random), 3, sampler=Order(seeded())),
    "nobody's numbers": lambda: DataLoader(Noisy(entropy), 3, sampler=Order(seeded())),
    "nobody's, in a worker": lambda: DataLoader(
        Noisy(entropy), 3, sampler=Order(seeded()), num_workers=1
    ),
    "nobody's, PyTorch's sampler": lambda: DataLoader(Noisy(entropy), 3, shuffle=True),
    "nobody's, wrapped": lambda: Wrapped(DataLoader(Noisy(entropy), 3, shuffle=True)),
    "own loader": Augmenting,
    "stream": lambda: DataLoader(Unlabelled(), 3),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("kind", sorted(AUGMENTED))
def test_augmentation_is_no_other_order(kind: str, tmp_path: Path) -> None:
    loader, stream = AUGMENTED[kind](), RandomStream(1, CPU)
    cursor = Cursor("train", loader, CPU)
    take(cursor, stream, 6)
    found = resumed(cursor, stream, AUGMENTED[kind](), tmp_path / "c.pt")
    with stream.aside():
        list(once_through(loader))  # after which the walk finds its place again
    assert found == take(cursor, stream, 6)
    cursor.suspend()


def test_a_position_of_an_earlier_version_is_gone_to() -> None:
    def make() -> DataLoader[Any]:  # of whose generators it saw but the loader's
        return DataLoader(DATA, 3, sampler=Order(np.random.default_rng(1)), generator=seeded())

    cursor, stream = Cursor("train", make(), CPU), RandomStream(1, CPU)
    take(cursor, stream, 2)
    state = cursor.state_dict()
    for later in ("beginning", "counts", "start_counts"):
        del state[later]
    for kind in ("generators", "start_generators"):
        state[kind] = state[kind][:1]
    again = Cursor("train", make(), CPU)
    with RandomStream(2, CPU).active():
        again.load_state_dict(state)
    assert take(again, stream, 2) == take(cursor, stream, 2)
