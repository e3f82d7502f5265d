"""Class weights against PyTorch's own, and together with the other kinds that change the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.base.views import Histogram
from ift_tune.hyper import ClassWeights, Compose, LabelSmoothing, LossMixture

LOSS = partial(F.cross_entropy, reduction="none")
WEIGHTS = torch.tensor([0.2, 1.0, 2.5, 0.7], dtype=torch.float64)


def make(places: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, *places, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (6, *places), generator=generator)


def weighted(transform: Any = "softplus") -> ClassWeights:
    kind = ClassWeights(4, transform=transform, like=WEIGHTS)
    kind.set_coarse({f"class_{k}": w for k, w in enumerate(WEIGHTS.tolist())})
    return kind


@pytest.mark.parametrize("transform", ["softplus", "exp"])
@pytest.mark.parametrize("places", [(), (3,), (2, 3)])
def test_losses_are_those_of_pytorch(transform: str, places: tuple[int, ...]) -> None:
    logits, targets = make(places)
    found = weighted(transform).criterion(LOSS)(logits, targets)
    torch.testing.assert_close(found, LOSS(logits, targets, weight=WEIGHTS))


@pytest.mark.parametrize("places", [(), (3,)])
def test_a_distribution_has_the_expected_weight(places: tuple[int, ...]) -> None:
    logits, _ = make(places)
    known = torch.softmax(make(places, seed=1)[0], dim=1)
    expected = torch.einsum("bk...,k->b...", known, WEIGHTS)
    found = weighted().criterion(LOSS)(logits, known)
    torch.testing.assert_close(found, expected * LOSS(logits, known))


def test_class_numbers_are_probabilities_of_one() -> None:
    logits, targets = make((2,))
    known = F.one_hot(targets, 4).movedim(-1, 1).double()
    kind = weighted()
    torch.testing.assert_close(kind.of_targets(logits, targets), kind.of_targets(logits, known))


def test_composed_with_smoothing_the_outer_kind_sees_the_targets_first() -> None:
    logits, targets = make()
    weights, smoothing = weighted(), LabelSmoothing(4, init=0.2).double()
    soft = smoothing.soften(logits, targets)
    outer = Compose({"smoothing": smoothing, "weights": weights}).criterion(LOSS)
    torch.testing.assert_close(outer(logits, targets), WEIGHTS[targets] * LOSS(logits, soft))
    inner = Compose({"weights": weights, "smoothing": smoothing}).criterion(LOSS)
    torch.testing.assert_close(inner(logits, targets), (soft @ WEIGHTS) * LOSS(logits, soft))


def test_composed_with_a_mixture_the_outer_kind_takes_the_inner_for_its_loss() -> None:
    logits, targets = make()
    weights, mixture = weighted(), LossMixture(("cross_entropy", "brier"), init=0.6).double()
    plain, brier = LOSS(logits, targets), mixture.criterion(LOSS)(logits, targets) / 0.6
    outer = Compose({"mixture": mixture, "weights": weights}).criterion(LOSS)
    torch.testing.assert_close(
        outer(logits, targets), 0.6 * WEIGHTS[targets] * brier, rtol=1e-6, atol=1e-8
    )
    inner = Compose({"weights": weights, "mixture": mixture}).criterion(LOSS)
    torch.testing.assert_close(
        inner(logits, targets),
        0.6 * (WEIGHTS[targets] * plain + brier - plain),
        rtol=1e-6,
        atol=1e-8,
    )


def test_few_weights_are_named_and_many_are_summarised() -> None:
    few, many = weighted(), ClassWeights(100, init=2.0)
    assert few.summary() == pytest.approx({f"class_{k}": w for k, w in enumerate(WEIGHTS.tolist())})
    assert {
        name: parameter.start for name, parameter in few.coarse_space().items()
    } == pytest.approx(few.summary())
    assert few.views() == []
    assert set(many.summary()) == {"min", "median", "mean", "max"}
    assert many.coarse_space() == {}
    before = many().detach().clone()
    many.set_coarse({})
    assert torch.equal(many().detach(), before)
    (view,) = many.views()
    assert isinstance(view, Histogram)
    assert view.values["all"].tolist() == pytest.approx([2.0] * 100)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"classes": 0}, "at least 2, got 0"),
        ({"init": 0.0}, "init must be a weight above 0, got 0.0"),
        ({"transform": "sigmoid"}, "unknown transform 'sigmoid'"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ClassWeights(**({"classes": 3} | arguments))
    with pytest.raises(UsageError, match="made for 3 classes"):
        ClassWeights(3).criterion(LOSS)(*make())


@pytest.mark.parametrize("init", [[0.5, 1.0, 2.0], torch.tensor([0.5, 1.0, 2.0])])
def test_each_class_may_have_a_start_of_its_own(init: Any) -> None:
    torch.testing.assert_close(ClassWeights(3, init=init)().detach(), torch.tensor([0.5, 1.0, 2.0]))
    with pytest.raises(UsageError, match=r"one for each of \(4,\), got shape \(3,\)"):
        ClassWeights(4, init=init)
    with pytest.raises(UsageError, match="init must be a weight above 0"):
        ClassWeights(3, init=[0.5, -1.0, 2.0])
