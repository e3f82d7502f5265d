"""Weights and losses of other shapes are refused: nothing is broadcast in silence."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import ClassificationProblem, Splits, UsageError
from ift_tune.hyper import (
    ClassWeights,
    Compose,
    DomainWeights,
    ExampleScorer,
    ExampleWeights,
    HyperKind,
    WeightDecay,
)
from ift_tune.hyper.base import Criterion

EXAMPLES, TOKENS = 4, 4
ROWS = (
    torch.randn(EXAMPLES, 3, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 1, 0]),
    torch.arange(EXAMPLES),
)


class Mine(HyperKind):
    """A kind of one's own, with a column of weights."""

    name: ClassVar[str] = "mine"

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(EXAMPLES, 1))

    def summary(self) -> dict[str, float]:
        return {}


class Weighing(Mine):
    """The column in `weigh`."""

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        return losses * self.raw


class Criticising(Mine):
    """The column in `criterion`."""

    def criterion(self, loss: Criterion) -> Criterion:
        return lambda logits, targets: loss(logits, targets) * self.raw


class Gathering(Mine):
    """A mean over tokens, each with a weight: fewer losses than were given."""

    def criterion(self, loss: Criterion) -> Criterion:
        return lambda logits, targets: (loss(logits, targets) * self.raw.mT).mean(dim=1)


def problem(kind: HyperKind, model: nn.Module | None = None) -> ClassificationProblem:
    torch.manual_seed(0)
    return ClassificationProblem(model or nn.Linear(3, 2), kind, Splits(*[[ROWS]] * 4))


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize(("make", "hook"), [(Weighing, "weigh"), (Criticising, "criterion")])
def test_a_kind_that_makes_more_losses_is_refused(
    make: type[Mine], hook: str, composed: bool
) -> None:
    kind: HyperKind = make()
    if composed:
        kind = Compose({"weights": ExampleWeights(EXAMPLES), "mine": kind})
    told = rf"{hook} of {make.__name__} must return .*shape \(4,\).*got \(4, 4\)"
    with pytest.raises(UsageError, match=told):
        problem(kind).train_loss(ROWS)


def test_by_hand_a_composition_says_it_too() -> None:
    kind = Compose({"mine": Weighing()})
    with pytest.raises(UsageError, match="weigh of Weighing"):
        kind.weigh(torch.ones(EXAMPLES), None)


def test_a_criterion_may_take_the_mean_over_answers() -> None:
    logits = torch.randn(EXAMPLES, 2, TOKENS)
    targets = torch.randint(2, (EXAMPLES, TOKENS))
    found = problem(Gathering(), nn.Identity()).train_loss((logits, targets))
    torch.testing.assert_close(found, F.cross_entropy(logits, targets))


@pytest.mark.parametrize(
    "kind",
    [
        ExampleWeights(EXAMPLES),
        DomainWeights([0, 1, 0, 1]),
        ExampleScorer(3),
    ],
)
def test_weights_of_examples_are_none_of_tokens(kind: HyperKind) -> None:
    told = rf"{type(kind).__name__} has weights of shape \(4,\).*got losses of shape \(4, 4\)"
    with pytest.raises(UsageError, match=told):
        kind.weigh_seen(torch.ones(EXAMPLES, TOKENS), ROWS[0], ROWS[2])


def test_class_weights_are_not_broadcast_to_other_losses() -> None:
    def pairs(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none").expand(EXAMPLES, EXAMPLES)

    with pytest.raises(UsageError, match=r"ClassWeights has weights of shape \(4,\)"):
        ClassWeights(2).criterion(pairs)(torch.zeros(EXAMPLES, 2), ROWS[1])


def test_a_composition_has_no_kind_twice() -> None:
    kind = ExampleWeights(EXAMPLES)
    with pytest.raises(UsageError, match="another kind as b, or leave it out, got those of a"):
        Compose({"a": kind, "b": kind})
    inner = Compose({"inner": kind})
    with pytest.raises(UsageError, match="another kind as outer"):
        Compose({"nested": inner, "outer": kind})


def test_a_composition_has_no_parameter_twice() -> None:
    model = nn.Linear(3, 2)
    one, other = WeightDecay(model, "tensor"), WeightDecay(model, "tensor")
    assert Compose({"one": one, "other": other}).count == 4
    other.raw[1] = one.raw[1]
    with pytest.raises(UsageError, match="another kind as other, or leave it out"):
        Compose({"one": one, "other": other})
