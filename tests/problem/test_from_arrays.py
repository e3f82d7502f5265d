"""`Splits.from_arrays`: disjoint, stratified, repeatable splits of any library's arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ift_tune
from ift_tune import Splits, UsageError

N = 120
INPUTS = np.random.default_rng(0).normal(size=(N, 3))
ROW = np.arange(N)  # which row it is, as a target
NAMES = ("train", "val", "search", "test")


def rows_of(splits: Splits) -> dict[str, list[int]]:
    """Return the targets of each split, all of its rows."""
    return {name: getattr(splits, name).tensors[1].tolist() for name in NAMES}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((0.5, 0.25, 0.125, 0.125), (60, 30, 15, 15)),
        ((0.6, 0.2, 0.1, 0.1), (72, 24, 12, 12)),
        ((1 / 3, 1 / 3, 1 / 6, 1 / 6), (40, 40, 20, 20)),
        ((70, 20, 20, 10), (70, 20, 20, 10)),
        ((np.int64(70), 20.0, np.float32(10.0), 10), (70, 20, 10, 10)),
        ({"val": 20, "search": 0.1, "test": 10}, (78, 20, 12, 10)),
        ({"train": 1, "val": 1, "search": 1, "test": 1}, (1, 1, 1, 1)),
        ((0.5, None, 0.25, 5), (60, 25, 30, 5)),
    ],
)
def test_sizes_are_fractions_counts_or_what_is_left(sizes: Any, expected: tuple[int, ...]) -> None:
    found = rows_of(Splits.from_arrays(INPUTS, ROW, sizes=sizes))
    assert tuple(len(rows) for rows in found.values()) == expected
    every = [row for rows in found.values() for row in rows]
    assert len(set(every)) == len(every)


@given(
    st.integers(10, 60), st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4), st.integers(0, 9)
)
@settings(max_examples=30, deadline=None)
def test_fractions_of_all_lose_no_row(rows: int, parts: list[float], seed: int) -> None:
    shares = [part / sum(parts) for part in parts]
    if min(shares) * rows < 1:
        return
    found = rows_of(Splits.from_arrays(np.zeros(rows), np.arange(rows), sizes=shares, seed=seed))
    assert sorted(row for split in found.values() for row in split) == list(range(rows))
    for share, split in zip(shares, found.values(), strict=True):
        assert abs(len(split) - share * rows) <= 1


def test_the_same_seed_draws_the_same_splits_and_batches_and_another_others() -> None:
    def draws(seed: int) -> tuple[dict[str, list[int]], list[list[int]]]:
        splits = Splits.from_arrays(INPUTS, ROW, seed=seed, batch_size=8)
        return rows_of(splits), [y.tolist() for _, y in splits.train]

    before = torch.get_rng_state()
    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_stay_together_in_every_split() -> None:
    splits = Splits.from_arrays(INPUTS, ROW, batch_size=7)
    for name in NAMES:
        for inputs, rows in getattr(splits, name):
            np.testing.assert_allclose(inputs, INPUTS[rows], rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("how", ["last", "own", "words"])
def test_stratified_splits_have_the_proportions_of_the_whole(classes: int, how: str) -> None:
    rng = np.random.default_rng(classes)
    share = rng.dirichlet(np.full(classes, 5.0))
    targets = np.r_[np.arange(classes).repeat(4), rng.choice(classes, 400, p=share)]
    words = np.array([f"class {k}" for k in targets])
    stratify: Any = {"last": True, "own": targets, "words": words}[how]
    splits = Splits.from_arrays(
        np.arange(len(targets)), targets, sizes=(0.55, 0.2, 0.15, 0.1), stratify=stratify
    )
    whole = Counter(targets.tolist())
    for name in NAMES:
        _, found = getattr(splits, name).tensors
        for k, number in Counter(found.tolist()).items():
            assert abs(number - whole[k] * len(found) / len(targets)) < 2, (name, k)


def test_a_class_as_rare_as_there_are_splits_is_in_each() -> None:
    targets = np.r_[np.zeros(96), np.ones(4)].astype(int)
    for seed in range(5):
        splits = Splits.from_arrays(
            np.zeros(100), targets, sizes=(25, 25, 25, 25), seed=seed, stratify=True
        )
        assert [int(getattr(splits, name).tensors[1].sum()) for name in NAMES] == [1] * 4


FRAME = pd.DataFrame({"age": [1.5, 2.0, 3.0, 4.0] * 5, "old": [True, False] * 10})


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((20, 2)), torch.float32),
        (np.zeros((20, 2), dtype=np.float16), torch.float32),
        (np.zeros((20, 2), dtype=">f8"), torch.float32),
        (np.asfortranarray(np.zeros((20, 2)))[::-1], torch.float32),
        (np.zeros(20, dtype=np.uint8), torch.int64),
        (np.zeros(20, dtype=np.uint32), torch.int64),
        (np.zeros(20, dtype=bool), torch.bool),
        (np.array([1, 2.5] * 10, dtype=object), torch.float32),
        (torch.zeros(20, 1, dtype=torch.float64), torch.float32),
        (torch.zeros(20, 1, requires_grad=True), torch.float32),
        (torch.zeros(20, dtype=torch.int32), torch.int64),
        ([[1, 2]] * 20, torch.int64),
        ([torch.ones(2)] * 20, torch.float32),
        (FRAME, torch.float32),
        (FRAME["age"], torch.float32),
        (pd.Series([1, 2] * 10, dtype="Int64"), torch.int64),
        (pd.DataFrame({"a": pd.array([1.0, 2.0] * 10, dtype="Float64"), "b": 1}), torch.float32),
    ],
)
def test_every_library_s_numbers_become_those_of_a_model(array: Any, dtype: torch.dtype) -> None:
    splits = Splits.from_arrays(array, np.arange(20), sizes=(5, 5, 5, 5))
    (batch,) = splits.test
    inputs: Tensor = batch[0]
    assert (inputs.dtype, inputs.requires_grad) == (dtype, False)
    row = int(batch[1][0])
    values = array.iloc[row] if hasattr(array, "iloc") else array[row]
    wanted = torch.as_tensor(np.array(values.tolist() if hasattr(values, "tolist") else values))
    torch.testing.assert_close(inputs[0].double(), wanted.double())


def test_double_precision_on_request_and_by_default() -> None:
    (inputs, _), *_ = Splits.from_arrays(INPUTS, ROW, dtype=torch.float64).train
    assert inputs.dtype is torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        (inputs, _), *_ = Splits.from_arrays(INPUTS, ROW).train
    finally:
        torch.set_default_dtype(torch.float32)
    assert inputs.dtype is torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Splits.from_arrays(), "one row for each example.*no array"),
        (lambda: Splits.from_arrays(INPUTS, ROW[:-1]), "120 in array 1, 119 in array 2"),
        (lambda: Splits.from_arrays(INPUTS, ["a"] * N), "array 2 must hold numbers: encode"),
        (lambda: Splits.from_arrays(INPUTS, pd.Series(["a", "b"] * 60)), "encode words"),
        (
            lambda: Splits.from_arrays(pd.DataFrame({"n": 1.0, "town": ["a"] * N}), ROW),
            "get_dummies.*other columns town",
        ),
        (
            lambda: Splits.from_arrays(pd.Series(["a"] * N, dtype="category"), ROW),
            "must hold numbers",
        ),
        (lambda: Splits.from_arrays([[1.0], [1.0, 2.0]], [0, 1]), "rows of one length: pad"),
        (lambda: Splits.from_arrays(np.where(ROW == 3, np.nan, 1.0), ROW), "1 rows with NaN"),
        (lambda: Splits.from_arrays(pd.Series([1, None] * 60, dtype="Int64"), ROW), "60 rows"),
        (lambda: Splits.from_arrays(np.ma.masked_array(ROW, mask=ROW < 2), ROW), "2 rows with NaN"),
        (lambda: Splits.from_arrays(1j * INPUTS, ROW), "must hold numbers"),
        (lambda: Splits.from_arrays(scipy.sparse.eye(N).tocsr(), ROW), "give X.toarray()"),
        (lambda: Splits.from_arrays(torch.eye(N).to_sparse(), ROW), "X.to_dense()"),
        (lambda: Splits.from_arrays(1.0), "a row for each example, got 1.0"),
        (lambda: Splits.from_arrays(pd.Timestamp(0)), "must hold numbers"),
        (lambda: Splits.from_arrays(INPUTS, sizes=(0.5, 0.5)), "four fractions or counts"),
        (lambda: Splits.from_arrays(INPUTS, sizes=(0.5, 0.5, 0.5, 0.5)), "more than there are"),
        (lambda: Splits.from_arrays(INPUTS, sizes=(100, 10, 10, 10)), "more than there are"),
        (lambda: Splits.from_arrays(INPUTS, sizes=(0.5, 0.3, 0.19, 0.001)), "got .*test 0"),
        (lambda: Splits.from_arrays(INPUTS, sizes=(0.5, -1, 0.2, 0.1)), "got -1"),
        (lambda: Splits.from_arrays(INPUTS, sizes=(60.5, 1, 1, 1)), "whole numbers, got 60.5"),
        (lambda: Splits.from_arrays(INPUTS, sizes={"valid": 0.2}), "got valid"),
        (lambda: Splits.from_arrays(INPUTS, sizes={"val": 0.2, "test": 0.2}), "what is left"),
        (lambda: Splits.from_arrays(INPUTS, ROW, seed=-1), "seed must be"),
        (lambda: Splits.from_arrays(INPUTS, ROW, batch_size=0), "batch_size must be"),
        (lambda: Splits.from_arrays(INPUTS, ROW, batch_size={"trian": 4}), "got trian"),
        (lambda: Splits.from_arrays(INPUTS, ROW, stratify=True), "rows of class 0"),
        (lambda: Splits.from_arrays(INPUTS, stratify=True), "one class for each row"),
        (lambda: Splits.from_arrays(INPUTS, ROW, stratify=[0, 1]), "120 rows, got 2"),
        (lambda: Splits.from_arrays(INPUTS, ROW, dtype=torch.int64), "torch.float32, got"),
        (lambda: Splits.from_arrays({"x": INPUTS}, stratify=True), "name an entry 'labels'"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_mend(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_batch_sizes_of_all_splits_or_by_name() -> None:
    splits = Splits.from_arrays(INPUTS, ROW, sizes=(70, 20, 20, 10), batch_size=16)
    assert [len(y) for _, y in splits.train] == [16] * 4
    assert [len(y) for _, y in splits.search] == [16, 4]
    assert [len(y) for _, y in splits.test] == [10]
    splits = Splits.from_arrays(
        INPUTS,
        ROW,
        sizes=(70, 20, 20, 10),
        batch_size={"train": 7.0, "val": None},  # type: ignore[dict-item]
    )
    assert [len(y) for _, y in splits.train] == [7] * 10
    assert [[len(y) for _, y in split] for split in (splits.val, splits.search)] == [[20], [20]]


def test_example_weights_find_their_examples() -> None:
    """λ of the examples with wrong labels falls, whichever rows they were."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(300, 2))
    right = (inputs[:, 0] > 0).astype(int)
    wrong = rng.random(300) < 0.2
    given = np.where(wrong, 1 - right, right)
    sizes = (200, 60, 20, 20)
    splits = Splits.from_arrays(inputs, given, sizes=sizes, index=True, batch_size=50)
    clean = Splits.from_arrays(inputs, wrong, right, sizes=sizes)  # the same seed: the same rows
    _, is_wrong, _ = clean.train.tensors  # type: ignore[attr-defined]
    splits = replace(splits, val=[(x, y) for x, _, y in clean.val])
    model = nn.Linear(2, 2)
    hyper = ift_tune.ExampleWeights(splits.train.size)  # type: ignore[attr-defined]
    problem = ift_tune.ClassificationProblem(model, hyper, splits)
    config = ift_tune.MetaConfig(inner_lr=0.1, meta_lr=0.3)
    joint = ift_tune.JointOptimizer(problem, config)
    for _ in range(15):
        joint.step()
    weights = hyper().detach()
    assert weights[is_wrong].mean() < weights[~is_wrong].mean() - 0.1


def test_mappings_of_arrays_give_mappings() -> None:
    tokens = {"ids": np.ones((N, 4), dtype=int), "mask": np.ones((N, 4), dtype=bool)}
    (inputs, targets), *_ = Splits.from_arrays(tokens, ROW % 3, stratify=True, batch_size=6).train
    assert {k: (v.shape, v.dtype) for k, v in inputs.items()} == {
        "ids": ((6, 4), torch.int64),
        "mask": ((6, 4), torch.bool),
    }
    assert targets.shape == (6,)
    splits = Splits.from_arrays({**tokens, "labels": ROW % 3}, stratify=True, index=True)
    (batch,) = splits.train
    assert batch.keys() == {"ids", "mask", "labels", "index"}
    assert torch.equal(batch["index"], torch.arange(72))
    (batch,) = splits.val
    assert batch.keys() == {"ids", "mask", "labels"}
