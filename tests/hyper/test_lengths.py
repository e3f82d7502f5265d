"""Hyperparameters of more or fewer examples than the training split has are warned of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ift_tune import (
    Batches,
    ClassificationProblem,
    Compose,
    DomainWeights,
    ExampleScorer,
    ExampleWeights,
    HyperKind,
    Splits,
    WeightDecay,
)

ROWS = 12
MODEL = nn.Linear(2, 3)
TENSORS = torch.randn(ROWS, 2), torch.arange(ROWS) % 3, torch.arange(ROWS)


def warned(hyper: HyperKind, train: Any, caplog: pytest.LogCaptureFixture) -> bool:
    caplog.clear()
    ClassificationProblem(MODEL, hyper, Splits(train, *[[TENSORS]] * 3))
    return "training examples: make it of the training split" in caplog.text


@pytest.mark.parametrize("n", [ROWS - 1, ROWS, ROWS + 1, 9 * ROWS])
def test_other_lengths_are_warned_of(n: int, caplog: pytest.LogCaptureFixture) -> None:
    kinds = [
        ExampleWeights(n),
        DomainWeights(["a", "b", "c"] * (n // 3) + ["a"] * (n % 3)),
        ExampleScorer(features=torch.randn(n, 4)),
        Compose({"decay": WeightDecay(MODEL), "weights": ExampleWeights(n)}),
        Compose({"right": ExampleWeights(ROWS), "weights": ExampleWeights(n)}),
    ]
    loader = DataLoader(TensorDataset(*TENSORS), batch_size=4)
    for kind in kinds:
        for train in (Batches(*TENSORS, batch_size=5), loader):
            assert warned(kind, train, caplog) is (n != ROWS)


def test_nothing_is_said_where_the_length_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    part = DataLoader(Subset(TensorDataset(*TENSORS), [0, 5]), batch_size=2)
    for train in (part, [TENSORS]):
        assert not warned(ExampleWeights(ROWS + 8), train, caplog)
    assert not warned(WeightDecay(MODEL), Batches(*TENSORS), caplog)
