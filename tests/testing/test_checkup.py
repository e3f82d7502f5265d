"""What ``ift-tune check`` says, in seconds, of nets that exact comparisons are not for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from ift_tune import Batches, ClassificationProblem, MetaConfig, Splits, UsageError, WeightDecay
from ift_tune.base.errors import CheckFailedError
from ift_tune.testing import Quadratic, checkup
from ift_tune.testing.checkup import describe_modes, examine
from ift_tune.testing.price import Price

CONFIG = MetaConfig(inner_lr=0.01)


def problem_of(model: nn.Module, *shape: int) -> ClassificationProblem:
    torch.manual_seed(0)
    inputs, targets = torch.randn(60, *shape), torch.randint(3, (60,))
    rows = [Batches(inputs, targets, batch_size=30) for _ in range(4)]
    return ClassificationProblem(model, WeightDecay(model, "weight"), Splits(*rows))


def relu_net() -> ClassificationProblem:
    return problem_of(nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 3)), 20)


def convolutions() -> ClassificationProblem:
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return problem_of(nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(144, 3)), 1, 8, 8)


@pytest.mark.parametrize("make", [relu_net, convolutions])
def test_a_net_with_kinks_is_judged_without_exact_comparisons(make: object) -> None:
    assert callable(make)
    said: list[str] = []
    found = examine(make, CONFIG, say=said.append)
    assert found.start is not None
    assert found.start.status == "passed"
    assert found.exact is None
    assert "kinks" in found.left_out
    assert found.peak_bytes > 0
    assert said[0].endswith("hyperparameters")
    assert json.loads(json.dumps(found.as_dict()))["start"]["gradients"] <= 6


def test_a_softmax_before_the_loss_is_advised_against(caplog: pytest.LogCaptureFixture) -> None:
    found = examine(
        lambda: problem_of(nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)), 4),
        CONFIG,
        say=lambda line: None,
    )
    (advice,) = [finding for finding in found.findings if finding.topic == "logits"]
    assert advice.level == "advice"
    assert "leave its last softmax out" in advice.sentence
    assert caplog.text.count(advice.sentence) == 1


def test_modes_are_said_in_words() -> None:
    model = convolutions().model
    assert describe_modes(model)[0].startswith("dropout in 5")
    assert "BatchNorm in 1" in describe_modes(model)[1]
    model[0].requires_grad_(False)  # type: ignore[index]
    model[1].eval()  # type: ignore[index]
    words = "\n".join(describe_modes(model))
    assert "in evaluation mode also in training: 1" in words
    assert "frozen, so no weights: 0.weight, 0.bias" in words
    assert describe_modes(nn.Linear(2, 1)) == []


def test_the_modes_that_are_said_are_those_of_training() -> None:
    def make() -> ClassificationProblem:
        problem = convolutions()
        problem.model.eval()  # as a whole, as a hub gives it: it trains in training mode
        return problem

    assert examine(make, CONFIG).modes == examine(convolutions, CONFIG).modes


class Doubled(Quadratic):
    """Autograd sees half of its second derivative."""

    def train_loss(self, batch: object) -> Tensor:
        loss = super().train_loss(batch)
        goal = self.model().detach()
        cut: Tensor = self.model() @ self.matrix @ goal
        return loss + 0.5 * cut


def test_a_wrong_derivative_fails_before_anything_dear() -> None:
    with pytest.raises(CheckFailedError, match="not"):
        examine(Doubled, CONFIG, say=lambda line: None)


def test_exact_comparisons_are_made_where_cheap_asked_for_or_not_at_all() -> None:
    def quiet(line: str) -> None:
        """Say nothing."""

    cheap = examine(Quadratic, CONFIG, say=quiet)
    assert cheap.exact is not None
    assert cheap.exact.passed
    assert cheap.as_dict()["exact"]["status"] == "converged"
    assert examine(Quadratic, CONFIG, exact=False, say=quiet).left_out == "as asked for"
    off = examine(Quadratic, CONFIG.updated({"start_check": False}), say=quiet)
    assert off.start is None
    large = lambda: problem_of(nn.Linear(2000, 3), 2000)  # noqa: E731
    with pytest.raises(UsageError, match=r"smaller model .* got 6,003"):
        examine(large, CONFIG, exact=True, say=quiet)
    assert "6,003" not in examine(large, CONFIG, say=quiet).left_out


def test_what_would_take_minutes_is_left_out_with_an_estimate() -> None:
    price = Price(2000, 1, inner_step=1e-3, outer_step=1e-2, inner_steps=20, product=1e-3)
    assert checkup._reason(None, price, 2000) == (
        "they would take about 3 minutes; --exact makes them"
    )
    assert checkup._reason(None, price, 20) == ""
