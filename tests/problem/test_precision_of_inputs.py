"""Inputs of another precision than the model's are named, where PyTorch names two matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ift_tune import (
    Batches,
    ClassificationProblem,
    JointOptimizer,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
)

ROWS = torch.randn(8, 1, 6), torch.arange(8) % 2


class Named(nn.Module):
    """A model of inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, values: torch.Tensor) -> Any:
        return self.layer(values.flatten(1))


MODELS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 2)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(1, 1, 3), nn.Flatten(), nn.Linear(4, 2)),
    "recurrent": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 6)), Last()),
    "by name": Named,
}


class Last(nn.Module):
    """The last state of a recurrent net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(6, 2, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.net(inputs)[0][:, -1]


def joint_on(name: str, inputs: torch.Tensor) -> JointOptimizer:
    """Return one of a model on inputs of some type."""
    batches = (
        Batches({"values": inputs, "labels": ROWS[1]}, batch_size=4)
        if name == "by name"
        else Batches(inputs, ROWS[1], batch_size=4)
    )
    model = MODELS[name]()
    problem = ClassificationProblem(model, WeightDecay(model), Splits(*[batches] * 4))
    return JointOptimizer(problem, MetaConfig())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("theirs", [torch.float64, torch.float16])
def test_it_is_said_which_is_which(name: str, theirs: torch.dtype) -> None:
    joint = joint_on(name, ROWS[0].to(theirs))
    with pytest.raises(UsageError, match=f"type, torch.float32: convert .* got {theirs}"):
        joint.step()


@pytest.mark.parametrize("name", MODELS)
def test_whole_numbers_are_said_to_be_wanted_real(name: str) -> None:
    joint = joint_on(name, (ROWS[0] * 100).byte())
    with pytest.raises(UsageError, match=r"type, torch.float32: .* real numbers.* got torch.uint8"):
        joint.step()


def test_whole_numbers_that_a_model_takes_are_not_to_blame() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(5, 2))
    splits = Splits(*[Batches(torch.ones(8, 2).long(), ROWS[1])] * 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        JointOptimizer(
            ClassificationProblem(model, WeightDecay(model), splits), MetaConfig()
        ).step()


def test_another_error_of_the_model_stays_what_it_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    splits = Splits(*[Batches(*ROWS)] * 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        JointOptimizer(
            ClassificationProblem(model, WeightDecay(model), splits), MetaConfig()
        ).step()
