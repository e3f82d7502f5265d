"""A model that ends in a softmax is told of, once in a run; others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    BilevelProblem,
    Budget,
    ClassificationProblem,
    MetaConfig,
    Splits,
    WeightDecay,
    run_single,
)
from ift_tune.base.once import is_new, saying_once
from ift_tune.hyper.supervised import PROBABILITIES
from ift_tune.testing.logits import softmax_before_the_loss

ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class OfProbabilities(ClassificationProblem):
    """A loss that takes them."""

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        return F.nll_loss(outputs.log(), targets, reduction=reduction)


class OwnLoss(nn.Module):
    """A model with a loss of its own beside its probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.layer(inputs)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits.softmax(dim=1)}


def problem(
    *ends: nn.Module, make: type[ClassificationProblem] = ClassificationProblem
) -> ClassificationProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), *ends)
    return make(model, WeightDecay(model, "tensor"), Splits(*[[ROWS]] * 4))


def told(found: ClassificationProblem, batch: Any, caplog: pytest.LogCaptureFixture) -> int:
    caplog.clear()
    for _ in range(2):
        found.train_loss(batch)
    said = caplog.text.count("looks like probabilities")
    assert len(softmax_before_the_loss(found, batch)) == said
    return said


def test_a_softmax_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    assert told(problem(nn.Softmax(dim=1)), ROWS, caplog) == 1
    spread = problem(nn.Softmax(dim=1), nn.Unflatten(1, (3, 1)))
    assert told(spread, (ROWS[0], ROWS[1].unsqueeze(1)), caplog) == 1


@pytest.mark.parametrize("end", [nn.Identity(), nn.LogSoftmax(dim=1), nn.Sigmoid(), nn.ReLU()])
def test_what_else_a_model_ends_in_is_not(end: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    assert told(problem(end), ROWS, caplog) == 0


def test_few_answers_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    few = ROWS[0][:2], ROWS[1][:2]
    assert told(problem(nn.Softmax(dim=1)), few, caplog) == 0


def test_a_loss_of_probabilities_is_right(caplog: pytest.LogCaptureFixture) -> None:
    assert told(problem(nn.Softmax(dim=1), make=OfProbabilities), ROWS, caplog) == 0
    model = OwnLoss()
    own = ClassificationProblem(model, WeightDecay(model, "tensor"), Splits(*[[ROWS]] * 4))
    batch = {"inputs": ROWS[0], "labels": ROWS[1]}
    assert told(own, batch, caplog) == 0


def test_a_run_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        return problem(nn.Softmax(dim=1))

    for number in range(2):
        caplog.clear()
        out, config = tmp_path / str(number), MetaConfig(inner_steps=2)
        run_single(make, Budget(outer_steps=2), out=out, config=config, device="cpu")
        assert caplog.text.count("looks like probabilities") == 1


def test_a_sentence_is_new_once_in_a_run_and_always_outside() -> None:
    assert is_new(PROBABILITIES)
    with saying_once():
        assert is_new(PROBABILITIES)
        with saying_once():
            assert not is_new(PROBABILITIES)
            assert is_new("another")
    assert is_new(PROBABILITIES)
