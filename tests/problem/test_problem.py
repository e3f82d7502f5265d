"""What a user writes once: its mistakes are listed."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ift_tune import Batches, BilevelProblem, Splits, UsageError
from ift_tune.problem.batches import Batch, Loader, to_device
from ift_tune.problem.sizes import guess_batch_size

LOADER = [torch.zeros(1)]
SPLITS = Splits(LOADER, LOADER, LOADER, LOADER)


class _Problem(BilevelProblem):
    """Any attributes."""

    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def train_loss(self, batch: Batch) -> Tensor:
        return torch.zeros(())

    def val_loss(self, batch: Batch) -> Tensor:
        return torch.ones(())


def test_validate_lists_every_mistake_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        _Problem(model="net", splits=LOADER).validate()
    message = str(caught.value)
    assert "_Problem is incomplete" in message
    assert "`model` must be a Module, got str" in message
    assert "`hyper` must be a Module, got NoneType" in message
    assert "`splits` must be a Splits, got list" in message


def test_a_tensor_cannot_be_weight_and_hyperparameter() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="2 tensors are both weights and hyperparameters"):
        _Problem(model=model, hyper=nn.Sequential(model), splits=SPLITS).validate()


@pytest.mark.parametrize("empty", ["model", "hyper"])
def test_there_must_be_something_to_differentiate_by(empty: str) -> None:
    parts = {"model": nn.Linear(2, 2), "hyper": nn.Linear(2, 2)} | {empty: nn.ReLU()}
    with pytest.raises(UsageError, match="is empty"):
        _Problem(**parts, splits=SPLITS).validate()


def test_half_precision_is_refused_by_name() -> None:
    parts = {"model": nn.Linear(2, 2).half(), "hyper": nn.Linear(2, 2)}
    with pytest.raises(UsageError, match=r"weight is torch\.float16"):
        _Problem(**parts, splits=SPLITS).validate()


def test_frozen_parameters_are_no_weights() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    problem = _Problem(model=model, hyper=nn.Linear(1, 1), splits=SPLITS)
    problem.validate()
    assert [w is model.weight for w in problem.weights()] == [True]


def test_defaults_measure_the_validation_loss_and_nothing_else() -> None:
    problem = _Problem()
    assert {k: float(v) for k, v in problem.metrics(None).items()} == {"loss": 1.0}
    assert problem.penalty() is None
    assert problem.summary() == {}


@pytest.mark.parametrize("split", ["train", "val", "search", "test", "curvature"])
@pytest.mark.parametrize("kind", ["iterator", "generator", "number"])
def test_a_loader_that_can_be_walked_once_only_is_refused(split: str, kind: str) -> None:
    wrong: Any = {"iterator": iter(LOADER), "generator": (b for b in LOADER), "number": 3}[kind]
    parts: dict[str, Any] = dict.fromkeys(("train", "val", "search", "test"), LOADER)
    with pytest.raises(UsageError, match=f"Splits.{split} must be a loader"):
        Splits(**parts | {split: wrong})


def test_a_missing_split_is_refused_but_for_curvature() -> None:
    nothing: Any = None
    assert Splits(LOADER, LOADER, LOADER, LOADER, curvature=None).curvature is None
    with pytest.raises(UsageError, match="test"):
        Splits(LOADER, LOADER, LOADER, nothing)


@pytest.mark.parametrize(
    "loader", [[torch.zeros(2)], Batches(torch.zeros(2)), DataLoader(TensorDataset(torch.zeros(2)))]
)
def test_loaders_of_every_kind_are_taken(loader: Loader) -> None:
    assert Splits(loader, loader, loader, loader).train is loader


Pair = namedtuple("Pair", ["x", "y"])
ROWS = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (ROWS, 5),
        ((ROWS, torch.zeros(5)), 5),
        ([["name"], ROWS], 5),
        ({"id": "a", "x": ROWS}, 5),
        ({"deep": {"x": ROWS}}, 5),
        (Pair(ROWS, ROWS), 5),
        (torch.tensor(1.0), 1),
    ],
)
def test_batch_size_is_the_tensors_first_dimension(batch: Batch, size: int) -> None:
    assert guess_batch_size(batch) == size


@pytest.mark.parametrize("batch", [None, "text", {}, ["a", 1]])
def test_a_batch_without_tensors_is_refused(batch: Batch) -> None:
    with pytest.raises(UsageError, match="at least one tensor"):
        guess_batch_size(batch)


def test_to_device_keeps_structure_and_objects() -> None:
    batch = {"pair": Pair(ROWS, [ROWS, "text"]), "t": (ROWS, None)}
    moved = to_device(batch, torch.device("cpu"))
    assert moved == batch
    assert type(moved["pair"]) is Pair
    assert moved["pair"].x is ROWS
    away = to_device(batch, torch.device("meta"))
    assert away["pair"].y[0].device.type == "meta"
    assert away["t"][0].device.type == "meta"
    assert away["pair"].y[1] == "text"
