"""Shares of a batch: how it is cut, and what the shares weigh."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ift_tune import UsageError
from ift_tune.problem.batches import Batch
from ift_tune.problem.shares import share_of


class Group(NamedTuple):
    rank: int
    size: int


class Rows:
    """A problem whose losses are means over rows."""

    def loss_size(self, batch: Batch) -> float | Tensor:
        rows: Tensor = batch["inputs"] if isinstance(batch, dict) else batch
        return len(rows)


class Positive(Rows):
    """One whose losses are means over what is above zero, counted where the tensors are."""

    def loss_size(self, batch: Batch) -> float | Tensor:
        count: Tensor = (batch > 0).sum()
        return count


def shares(problem: Rows, batch: Batch, size: int) -> list[tuple[Batch, Any]]:
    return [share_of(problem, batch, Group(rank, size)) for rank in range(size)]  # type: ignore[arg-type]


def test_shares_are_all_rows_once_with_weights_by_their_number() -> None:
    rows = torch.arange(14.0).reshape(7, 2)
    batch = {"inputs": rows, "epoch": 3, "labels": [torch.arange(7), torch.tensor(0.5)]}
    parts, weights = zip(*shares(Rows(), batch, 3), strict=True)
    assert torch.equal(torch.cat([part["inputs"] for part in parts]), rows)
    assert torch.equal(torch.cat([part["labels"][0] for part in parts]), torch.arange(7))
    assert [part["labels"][1] for part in parts] == [0.5] * 3
    assert [part["epoch"] for part in parts] == [3] * 3
    assert weights == (2 / 7, 2 / 7, 3 / 7)


def test_who_has_no_row_weighs_nothing_and_computes_on_the_whole() -> None:
    (first, nothing), (second, all_of_it) = shares(Rows(), torch.ones(1, 2), 2)
    assert (nothing, all_of_it) == (0, 1)
    assert first.shape == second.shape == (1, 2)


def test_shares_weigh_by_what_the_losses_are_means_over() -> None:
    (_, one), (_, other) = shares(Positive(), torch.tensor([1.0, -1.0, 2.0, 3.0, -4.0, 5.0]), 2)
    assert one.dtype == torch.float64  # in single precision, weights would not add up to 1
    assert (float(one), float(other)) == (0.5, 0.5)
    (_, none), (_, every) = shares(Positive(), torch.tensor([-1.0, 1.0]), 2)
    assert (float(none), float(every)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4), torch.ones(3)), "got tensors with 3 and 4 rows"),
        ((torch.ones(2), ["a cat", "a dog"]), "row for each example.*got a str"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        ({"count": 3}, "got tensors with none rows"),
        (torch.nn.utils.rnn.pack_sequence([torch.ones(2, 3), torch.ones(1, 3)]), "PackedSequence"),
    ],
)
def test_what_cannot_be_cut_is_refused(batch: Batch, message: str) -> None:
    with pytest.raises(UsageError, match=f"several processes share.*{message}"):
        share_of(Rows(), batch, Group(0, 2))  # type: ignore[arg-type]
