"""Splits that share examples are told from those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ift_tune import Batches, ClassificationProblem, Splits, WeightDecay, tasks
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.overlap import shared_examples


def problem(rows: dict[str, torch.Tensor], names: bool = False) -> BilevelProblem:
    """Return a classification whose splits have these inputs."""
    loaders = []
    for inputs in rows.values():
        targets = torch.arange(len(inputs)) % 2
        held = ({"x": inputs, "labels": targets},) if names else (inputs, targets)
        loaders.append(Batches(*held, batch_size=3))
    model = nn.Linear(4, 2)
    return ClassificationProblem(model, WeightDecay(model), Splits(*loaders))


def rows(*sizes: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    names = ("train", "val", "search", "test")
    return {n: torch.randn(s, 4).to(dtype) for n, s in zip(names, sizes, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pair", [("val", "train"), ("search", "val"), ("test", "train")])
@pytest.mark.parametrize("names", [False, True])
def test_what_is_shared_is_counted(pair: tuple[str, str], dtype: torch.dtype, names: bool) -> None:
    found = rows(20, 10, 10, 10, dtype=dtype)
    split, other = pair
    found[split][:4] = found[other][3:7]
    (finding,) = shared_examples(problem(found, names))
    assert f"4 of 10 examples of the {split} split are in the {other} split" in finding.sentence
    assert finding.numbers == {"shared": 4.0, "examples": 10.0}


def test_a_few_that_are_equal_by_chance_are_let_pass() -> None:
    found = rows(60, 60, 30, 30)
    found["val"][:2] = found["train"][:2]
    assert shared_examples(problem(found)) == []


@pytest.mark.parametrize("name", ["digits-cleaning", "digits-weight-decay", "text-mixture"])
def test_the_tasks_share_none(name: str) -> None:
    task = tasks.get(name, embedded=True)
    assert shared_examples(task.make_problem(task.default_config, torch.device("cpu"), 0)) == []
