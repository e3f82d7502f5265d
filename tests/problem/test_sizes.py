"""The size of a batch: what its shapes tell, and what they leave open is asked for."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from ift_tune import UsageError
from ift_tune.problem.batches import Batch, map_batch
from ift_tune.problem.sizes import as_size, guess_batch_size

ROWS = torch.zeros(5, 2)
NUMBERS = torch.zeros(5, dtype=torch.long)
SCALAR = torch.tensor(1.0)
PACKED = pack_sequence([torch.zeros(n, 2) for n in (4, 3, 3, 2, 1)])


@dataclass(frozen=True)
class Graphs:
    nodes: Tensor
    label: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        [ROWS],
        [ROWS, NUMBERS],
        (ROWS, ROWS),
        ((ROWS, NUMBERS), NUMBERS),
        PACKED,
        (PACKED, NUMBERS),
        UserDict({"ids": ROWS, "mask": NUMBERS, "name": "text"}),
        Graphs(ROWS, NUMBERS),
    ],
)
def test_a_size_that_all_tensors_agree_on_is_taken(batch: Batch) -> None:
    assert guess_batch_size(batch) == 5


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((ROWS.T, NUMBERS), "2 and 5"),  # sequences first
        ({"mask": torch.ones(7, 7), "ids": ROWS}, "5 and 7"),
        (Graphs(ROWS, torch.zeros(3)), "3 and 5"),
        ({"scale": SCALAR, "ids": ROWS}, "scalars"),
        ((ROWS, SCALAR), "scalars"),
        ([ROWS, ROWS, ROWS], "alike"),
        ([(ROWS, SCALAR)], "alike"),
        ([{"boxes": ROWS}], "alike"),
        ([(ROWS, SCALAR), (ROWS[:2], SCALAR)], "alike"),
        (([ROWS, ROWS], NUMBERS), "alike"),
        (((ROWS, ROWS), ({"boxes": ROWS}, {"boxes": ROWS})), "alike"),
        ((np.zeros((5, 2)), np.zeros(5)), "as_tensor"),
    ],
)
def test_a_size_that_is_open_is_asked_for(batch: Batch, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        guess_batch_size(batch)
    assert "override batch_size(batch)" in str(caught.value)
    assert "got" in str(caught.value)


@pytest.mark.parametrize("size", [3, 2.5, np.int64(4), torch.tensor(6), 0])
def test_a_size_of_ones_own_is_a_number(size: Any) -> None:
    assert as_size(size) == float(size)


@pytest.mark.parametrize("size", [None, "3", True, -1, float("nan"), torch.zeros(2), np.zeros(2)])
def test_any_other_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match=r"batch_size\(batch\) must .* got"):
        as_size(size)


def test_batches_of_every_structure_are_mapped() -> None:
    away = torch.device("meta")
    encoding: Any = map_batch(lambda t: t.to(away), UserDict({"ids": ROWS, "name": "text"}))
    assert type(encoding) is UserDict
    assert encoding["ids"].device == away
    assert encoding["name"] == "text"
    graphs: Any = map_batch(lambda t: t.to(away), Graphs(ROWS, NUMBERS))
    assert type(graphs) is Graphs
    assert graphs.label.device == away
    packed: Any = map_batch(lambda t: t.double(), PACKED)
    assert type(packed) is PackedSequence
    assert packed.data.dtype == torch.float64
    assert packed.batch_sizes.dtype == torch.int64
