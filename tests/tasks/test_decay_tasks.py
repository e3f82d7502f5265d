"""The diabetes task: its table, its hypergradient, and that it learns."""

from __future__ import annotations

import torch

from ift_tune import JointOptimizer, tasks
from ift_tune.tasks.datasets import diabetes
from ift_tune.testing import check_hypergradient


def test_the_table_is_standardised() -> None:
    table = diabetes()
    assert table.inputs.shape == (442, 10)
    for columns in (table.inputs, table.targets):
        assert columns.mean(dim=0).abs().max() < 1e-5
        torch.testing.assert_close(
            columns.std(dim=0, correction=0), torch.ones_like(columns[0]), rtol=1e-4, atol=1e-4
        )


def test_its_hypergradient_is_right() -> None:
    task = tasks.get("diabetes-weight-decay")
    assert check_hypergradient(task.make_problem(task.default_config, "cpu", 0)).passed


def test_its_decays_learn() -> None:
    task = tasks.get("diabetes-weight-decay")
    joint = JointOptimizer(task.make_problem(task.default_config, "cpu", 0), task.default_config)
    joint.train_weights(200)
    before = joint.evaluate("test")["test_loss"]
    for _ in range(30):
        joint.step()
    assert joint.evaluate("test")["test_loss"] < before
