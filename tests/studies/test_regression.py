"""Regression, and the diabetes task."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from ift_tune import Batches, JointOptimizer, Splits, UsageError, tasks
from ift_tune.hyper import ExampleWeights, WeightDecay
from ift_tune.hyper.supervised import RegressionProblem
from ift_tune.tasks.datasets import diabetes
from ift_tune.testing import check_hypergradient


def _problem(columns: int = 1, flat: bool = True) -> RegressionProblem:
    torch.manual_seed(0)
    inputs = torch.randn(20, 3)
    targets = inputs @ torch.randn(3, columns)
    layers = [nn.Linear(3, columns), *([nn.Flatten(0)] if flat else [])]
    model = nn.Sequential(*layers)
    loader = Batches(inputs, targets[:, 0] if flat else targets, torch.arange(20))
    return RegressionProblem(model, WeightDecay(model), Splits(loader, loader, loader, loader))


@pytest.mark.parametrize(("columns", "flat"), [(1, True), (2, False)])
def test_the_losses_are_the_mean_squared_error(columns: int, flat: bool) -> None:
    problem = _problem(columns, flat)
    (batch,) = problem.splits.train
    mean = (problem.model(batch[0]) - batch[1]).square().mean()
    for loss in (problem.train_loss(batch), problem.val_loss(batch)):
        torch.testing.assert_close(loss, mean)
    assert set(problem.metrics(batch)) == {"loss"}


def test_examples_are_weighed() -> None:
    problem = _problem()
    problem.hyper = ExampleWeights(20)
    (batch,) = problem.splits.train
    with torch.no_grad():
        next(problem.hyper.parameters())[:10] = -1.0
        assert float(problem.train_loss(batch)) != float(problem.val_loss(batch))


def test_shapes_that_would_broadcast_are_refused() -> None:
    problem = _problem()
    inputs, targets, index = next(iter(problem.splits.train))
    for loss in (problem.train_loss, problem.val_loss):
        with pytest.raises(UsageError, match="Flatten"):
            loss((inputs, targets[:, None], index))


def test_a_module_that_is_no_kind_is_refused() -> None:
    problem = _problem()
    with pytest.raises(UsageError, match="kind of hyperparameters"):
        RegressionProblem(problem.model, nn.Linear(1, 1), problem.splits)  # type: ignore[arg-type]


def test_the_hypergradient_is_right() -> None:
    task = tasks.get("diabetes-weight-decay")
    assert check_hypergradient(task.make_problem(task.default_config, "cpu", 0)).passed


def test_the_table_is_standardised() -> None:
    table = diabetes()
    assert table.inputs.shape == (442, 10)
    for columns in (table.inputs, table.targets):
        assert columns.mean(dim=0).abs().max() < 1e-5
        torch.testing.assert_close(
            columns.std(dim=0, correction=0), torch.ones_like(columns[0]), rtol=1e-4, atol=1e-4
        )


def test_the_task_has_the_sizes_it_declares_and_learns() -> None:
    task = tasks.get("diabetes-weight-decay")
    problem = task.make_problem(task.default_config, "cpu", 0)
    splits = {
        name: len(next(iter(getattr(problem.splits, name)))[0])
        for name in ("train", "val", "search", "test")
    }
    assert asdict(task.sizes) == {"weights": 11, "hypers": 11, **splits}
    joint = JointOptimizer(problem, task.default_config)
    joint.train_weights(200)
    before = joint.evaluate("test")["test_loss"]
    for _ in range(30):
        joint.step()
    assert joint.evaluate("test")["test_loss"] < before
