"""Batches from memory, and walks over loaders that can be saved and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from ift_tune import Batches, UsageError
from ift_tune.base.checkpoints import load_checkpoint, save_checkpoint
from ift_tune.base.randomness import RandomStream
from ift_tune.problem.batches import Loader
from ift_tune.problem.loaders import Cursor

CPU = torch.device("cpu")
SIZE = 7


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_a_pass_is_a_permutation_less_the_rest(size: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, size)
    loader = Batches(torch.arange(size), batch_size=batch_size, seed=seed)
    for _ in range(2):
        batches = [rows for (rows,) in loader]
        assert [len(b) for b in batches] == [batch_size] * (size // batch_size)
        drawn = torch.cat(batches).tolist()
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(size))


def test_rows_of_all_tensors_stay_together() -> None:
    inputs = torch.randn(SIZE, 2, 3)
    for rows, numbers in Batches(inputs, torch.arange(SIZE), batch_size=3):
        assert torch.equal(rows, inputs[numbers])


def test_equal_seeds_give_equal_passes_and_every_pass_is_another() -> None:
    def passes(seed: int) -> list[list[int]]:
        loader = Batches(torch.arange(50), batch_size=50, seed=seed)
        return [rows.tolist() for _ in range(3) for (rows,) in loader]

    first = passes(1)
    assert passes(1) == first
    assert passes(2) != first
    assert len({tuple(order) for order in first}) == 3


def test_everything_in_one_batch_is_neither_shuffled_nor_copied() -> None:
    tensors = torch.randn(SIZE, 2), torch.arange(SIZE)
    (batch,) = list(Batches(*tensors))
    assert batch[0] is tensors[0]
    assert batch[1] is tensors[1]


def test_drawing_batches_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(Batches(torch.arange(SIZE), batch_size=2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "values", [np.zeros(3), pd.Series([1.0, 2.0, 3.0]), pd.DataFrame({"a": [1.0] * 3}), [1, 2, 3]]
)
def test_what_is_no_tensor_is_refused_with_the_mend(values: Any) -> None:
    with pytest.raises(UsageError, match=rf"torch.as_tensor.*got .*{type(values).__name__}"):
        Batches(torch.zeros(3), values)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="one device, got cpu, meta"):
        Batches(torch.zeros(3), torch.zeros(3, device="meta"))


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [((), None), ((3, 4), None), ((0,), None), ((3,), 0), ((3,), 4)]
)
def test_sizes_that_cannot_mean_anything_are_refused(
    sizes: tuple[int, ...], batch_size: int | None
) -> None:
    with pytest.raises(UsageError, match="got"):
        Batches(*(torch.zeros(size) for size in sizes), batch_size=batch_size)


class _Noisy(Dataset[Any]):
    """Adds global random numbers, as an augmentation does, to the example's number."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index + 0.5 * torch.rand(())


def _data() -> TensorDataset:
    return TensorDataset(torch.arange(SIZE))


LOADERS: dict[str, Callable[[], Loader]] = {
    "batches": lambda: Batches(torch.arange(SIZE), batch_size=2, seed=3),
    "whole": lambda: Batches(torch.arange(SIZE)),
    "list": lambda: [torch.tensor([0, 1]), torch.tensor([2])],
    "in order": lambda: DataLoader(_data(), batch_size=3),
    "shuffled": lambda: DataLoader(_data(), batch_size=3, shuffle=True),
    "shuffled, own generator": lambda: DataLoader(
        _data(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "sampler with a generator": lambda: DataLoader(
        _data(),
        batch_size=3,
        sampler=RandomSampler(range(SIZE), generator=torch.Generator().manual_seed(5)),
    ),
    "augmented": lambda: DataLoader(_Noisy(), batch_size=3, shuffle=True),
}


def _take(cursor: Cursor, stream: RandomStream, count: int) -> list[Any]:
    """Draw `count` batches as plain numbers, with other random draws in between, as dropout."""
    found = []
    with stream.active():
        for _ in range(count):
            batch = cursor.next()
            found.append((batch[0] if isinstance(batch, list | tuple) else batch).tolist())
            torch.rand(3)
    return found


def test_a_walk_goes_on_pass_after_pass() -> None:
    cursor = Cursor("train", Batches(torch.arange(4), batch_size=2), CPU)
    drawn = [int(row) for _ in range(6) for row in cursor.next()[0]]
    for start in (0, 4, 8):
        assert sorted(drawn[start : start + 4]) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", sorted(LOADERS))
@pytest.mark.parametrize("before", [0, 1, 3, 8])
def test_a_saved_walk_goes_on_to_the_bit(kind: str, before: int, tmp_path: Path) -> None:
    cursor, stream = Cursor("train", LOADERS[kind](), CPU), RandomStream(1, CPU)
    _take(cursor, stream, before)
    save_checkpoint(tmp_path / "c.pt", {"c": cursor.state_dict(), "s": stream.state_dict()})
    expected = _take(cursor, stream, 9)

    state = load_checkpoint(tmp_path / "c.pt")
    again, other = Cursor("train", LOADERS[kind](), CPU), RandomStream(2, CPU)
    with other.active():
        again.load_state_dict(state["c"])
    other.load_state_dict(state["s"])
    assert _take(again, other, 9) == expected


@pytest.mark.parametrize("kind", sorted(LOADERS))
@pytest.mark.parametrize("before", [0, 2])
def test_a_walk_can_be_taken_back(kind: str, before: int) -> None:
    cursor, stream = Cursor("train", LOADERS[kind](), CPU), RandomStream(1, CPU)
    _take(cursor, stream, before)
    position, numbers = cursor.state_dict(), RandomStream(0, CPU)
    numbers.load_state_dict(stream.state_dict())
    expected = _take(cursor, stream, 9)
    with stream.active():
        cursor.load_state_dict(position)
    assert _take(cursor, numbers, 9) == expected


def test_an_empty_loader_is_named() -> None:
    with pytest.raises(UsageError, match="the val loader yields no batch"):
        Cursor("val", [], CPU).next()
