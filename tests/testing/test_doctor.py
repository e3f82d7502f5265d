"""What ``ift-tune check`` says of real architectures, and of each fault by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ift_tune import (
    Batches,
    BilevelProblem,
    Budget,
    ClassificationProblem,
    MetaConfig,
    Splits,
    WeightDecay,
)
from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.hyper import ExampleWeights
from ift_tune.tasks.vision import torchvision_part
from ift_tune.testing import Quadratic, examination
from ift_tune.testing.checkup import Study, examine
from ift_tune.testing.plan import duration
from ift_tune.testing.symptoms import Finding, Level, signal_to_noise

CONFIG = MetaConfig(inner_steps=2, inner_lr=0.01)
CLASSES = 3
Make = Callable[[], BilevelProblem]


def problem_of(
    model: nn.Module,
    inputs: Tensor,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> ClassificationProblem:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(CLASSES, (len(inputs),), generator=generator)
    rows = [Batches(inputs, targets, batch_size=batch_size) for _ in range(4)]
    return ClassificationProblem(model, WeightDecay(model, "model", init=1e-3), Splits(*rows))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def looked_at(make: Make, config: MetaConfig = CONFIG) -> list[Finding]:
    """Return what is found, what is wrong included."""
    torch.manual_seed(0)
    told: list[Finding] = []
    try:
        examine(make, config, exact=False, say=lambda line: None, found=told.append)
    except (CheckFailedError, UsageError):
        assert told[-1].level is Level.WRONG
    return told


def about(topic: str, told: list[Finding]) -> str:
    return "\n".join(str(finding) for finding in told if finding.topic == topic)


def level(topic: str, told: list[Finding]) -> Level:
    (found,) = [finding.level for finding in told if finding.topic == topic]
    return found


def nothing_wrong(told: list[Finding]) -> bool:
    return all(finding.level is not Level.WRONG for finding in told)


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(inputs).mean(dim=1))
        return found


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.memory(inputs)[0][:, -1])
        return found


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head, self.reentrant = nn.Linear(8, CLASSES), reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        found: Tensor = self.head(checkpoint(self.middle, hidden, use_reentrant=self.reentrant))
        return found


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        slope: Tensor = gradient * x.cos()
        return slope


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Once.apply(x)  # type: ignore[no-untyped-call]
        return found


@pytest.mark.nightly
def test_resnet18_of_torchvision() -> None:
    resnet18 = torchvision_part("models").resnet18

    def make() -> ClassificationProblem:
        return problem_of(resnet18(num_classes=CLASSES), numbers(8, 3, 16, 16))

    cheap = {"terms": 1, "alpha": 0.01, "inner_steps": 1, "inner_lr": 1e-4}
    told = looked_at(make, CONFIG.updated(cheap))
    assert nothing_wrong(told)
    assert "BatchNorm in bn1, layer1.0.bn1, layer1.0.bn2 and 17 more" in about("modes", told)
    assert level("operations", told) is Level.OK
    assert level("derivatives", told) is Level.OK


def test_a_transformer_on_fast_attention() -> None:
    told = looked_at(lambda: problem_of(Transformer(), numbers(24, 5, 8), batch_size=8))
    assert nothing_wrong(told)
    assert "fast attention in encoder.layers.0.self_attn" in about("operations", told)
    assert "plain mathematics" in about("operations", told)
    assert level("attention", told) is Level.OK
    assert "cosine 1.0000" in about("attention", told)


def test_an_lstm() -> None:
    told = looked_at(lambda: problem_of(Recurrent(), numbers(24, 5, 6), batch_size=8))
    assert nothing_wrong(told)
    assert "recurrent layers in memory: as they are here" in about("operations", told)
    assert level("derivatives", told) is Level.OK


@pytest.mark.parametrize(
    ("reentrant", "words"), [(True, "a reentrant"), (False, "a checkpoint without reentrance")]
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_by_their_kind(reentrant: bool, words: str) -> None:
    told = looked_at(lambda: problem_of(Checkpointed(reentrant), numbers(24, 6)))
    assert nothing_wrong(told)
    assert words in about("operations", told)
    assert "kept activations" in about("operations", told)


def test_weight_norm_by_its_module() -> None:
    def make() -> ClassificationProblem:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        return problem_of(nn.Sequential(layer, nn.Tanh(), nn.Linear(8, CLASSES)), numbers(24, 6))

    told = looked_at(make)
    assert nothing_wrong(told)
    assert "weight_norm in 0" in about("operations", told)


def test_a_convolution_stays_the_operation_that_it_is() -> None:
    def make() -> ClassificationProblem:
        model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES))
        return problem_of(model, numbers(24, 2, 8))

    told = looked_at(make)
    assert nothing_wrong(told)
    assert "onvolution" not in about("operations", told)


def test_a_refused_function_is_named_with_its_module() -> None:
    def make() -> ClassificationProblem:
        model = nn.Sequential(nn.Linear(6, 8), Sine(), nn.Linear(8, CLASSES))
        return problem_of(model, numbers(24, 6))

    told = looked_at(make)
    assert told[-1].topic == "derivatives"
    assert "Once, whose backward is once_differentiable" in told[-1].sentence
    assert "(in 1)" in told[-1].sentence


class Detached(ClassificationProblem):
    """Its hyperparameters are cut off from the graph."""

    def train_loss(self, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        scale: Tensor = self.hyper().detach().mean()
        return loss * scale


def test_a_detached_hyperparameter_is_named() -> None:
    def make() -> Detached:
        plain = problem_of(nn.Linear(6, CLASSES), numbers(24, 6))
        return Detached(plain.model, ExampleWeights(24), plain.splits)

    told = looked_at(make)
    assert told[-1].topic == "effect"
    assert "raw" in told[-1].sentence


class Gated(Quadratic):
    """λ reaches the loss, multiplied by zero."""

    def train_loss(self, batch: object) -> Tensor:
        w = self.model()
        loss: Tensor = 0.5 * w @ self.matrix @ w - w @ self.coupling @ (0.0 * self.hyper())
        return loss

    def val_loss(self, batch: object) -> Tensor:
        loss: Tensor = 0.5 * (self.model() - self.goal).square().sum()
        return loss


def test_a_hyperparameter_without_effect_is_advised_about() -> None:
    told = looked_at(Gated)
    assert level("effect", told) is Level.ADVICE
    assert "value is exactly zero" in about("effect", told)


def test_dropout_is_said_with_what_it_does_to_the_loss() -> None:
    def make(rate: float) -> ClassificationProblem:
        layers = [nn.Linear(6, 16), nn.Tanh(), nn.Dropout(rate), nn.Linear(16, CLASSES)]
        return problem_of(nn.Sequential(*layers), numbers(24, 6))

    told = looked_at(lambda: make(0.5))
    assert "dropout in 2" in about("modes", told)
    assert "draws random numbers" in about("randomness", told)
    assert about("randomness", looked_at(lambda: make(0.0))) == ""


class Low(nn.Module):
    """Its forward pass is in bfloat16."""

    def __init__(self, low: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.low = low

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            found: Tensor = self.net(inputs)
        return found.to(inputs.dtype)


def test_what_bfloat16_does_to_this_hypergradient() -> None:
    error = {}
    for low in (True, False):
        told = looked_at(partial(lambda low: problem_of(Low(low), numbers(24, 6)), low))
        (error[low],) = [f.numbers["error"] for f in told if "error" in f.numbers]
        assert ("values in bfloat16" in about("precision", told)) is low
    assert error[False] < 1e-5 < 1e-3 < error[True] < 0.5


def test_parameters_in_bfloat16_are_refused_in_words() -> None:
    def make() -> ClassificationProblem:
        return problem_of(nn.Linear(6, CLASSES).to(torch.bfloat16), numbers(24, 6))

    told = looked_at(make)
    assert told[-1].topic == "problem"
    assert "keep the parameters in float32" in told[-1].sentence


def test_a_training_that_is_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "TRAINING_PATIENCE", 1e9)  # however slow the machine is
    far = looked_at(Quadratic, CONFIG)
    assert level("convergence", far) is Level.ADVICE
    assert "raise inner_steps" in about("convergence", far)
    near = looked_at(Quadratic, MetaConfig(inner_steps=3000, inner_lr=0.05))
    assert level("convergence", near) is Level.OK


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({"alpha": 1e-3}, Level.ADVICE, "tiny"),
        ({"alpha": 50.0}, Level.ADVICE, "beyond 2"),
        ({"alpha_scale": 1.0}, Level.OK, "α·λ_max = 1"),
        ({"inverse": "dense"}, Level.NOTE, "dense takes no α"),
    ],
)
def test_alpha_against_the_curvature(
    changes: dict[str, object], expected: Level, words: str
) -> None:
    told = looked_at(Quadratic, CONFIG.updated(changes))
    assert level("alpha", told) is expected
    assert words in about("alpha", told)
    if expected is Level.ADVICE:
        assert "set alpha_scale=1" in about("alpha", told)
    largest = float(torch.linalg.eigvalsh(Quadratic().matrix)[-1])
    (found,) = [f.numbers["lambda_max"] for f in told if f.topic == "alpha"]
    assert math.isclose(found, largest, rel_tol=0.05)


def test_noise_over_batches_has_a_standard_error() -> None:
    def make(batch_size: int | None) -> ClassificationProblem:
        torch.manual_seed(0)
        return problem_of(nn.Linear(6, CLASSES), numbers(60, 6), batch_size=batch_size)

    still = looked_at(lambda: make(None))
    assert "no noise" in about("noise", still)
    noisy = looked_at(lambda: make(4))
    (found,) = [f for f in noisy if f.topic == "noise"]
    assert found.numbers["standard_error"] > 0.0
    assert found.numbers["signal_to_noise"] < 3.0


def test_signal_to_noise_is_true_on_the_average() -> None:
    generator = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(200):
        draws = generator.normal(size=(5, 300)) + 0.2
        found = signal_to_noise(draws @ draws.T)
        ratios.append(found.ratio)
        errors.append(found.error)
    assert np.mean(ratios) == pytest.approx(0.2, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.5)


def test_a_study_is_planned_from_the_price_of_its_steps() -> None:
    study = Study(Budget(outer_steps=100, retrain=False), trials=10, workers=2)
    found = examine(Quadratic, CONFIG, exact=False, plan=study, say=lambda line: None)
    plan, price = found.plan, found.price
    assert plan is not None
    least = 100 * (2 * price.inner_step + price.outer_step)
    assert least <= plan.trial_seconds <= 2.0 * least + 1.0
    assert 5 * plan.trial_seconds <= plan.study_seconds <= 6 * plan.trial_seconds
    assert plan.per_device is None or plan.per_device >= 1
    assert plan.trial_bytes > found.peak_bytes
    counted = examine(
        Quadratic,
        CONFIG.updated({"alpha": 0.1}),
        exact=False,
        plan=Study(Budget(gradient_equivalents=1000.0)),
        say=lambda line: None,
    )
    assert counted.plan is not None
    # Two inner steps, two gradients, five terms, a residual and the mixed product.
    assert counted.plan.outer_steps == int(1000.0 / (2 + 2 + 2 * (5 + 1 + 1)))
    assert json.loads(json.dumps(counted.as_dict()))["plan"]["trials"] == 1


def test_durations_are_in_words() -> None:
    assert [duration(s) for s in (1.5, 600.0, 7200.0, 864_000.0)] == [
        "1.5 seconds",
        "10 minutes",
        "2.0 hours",
        "10.0 days",
    ]
