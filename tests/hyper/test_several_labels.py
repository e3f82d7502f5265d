"""Targets of several labels at once: each kind does them right or refuses them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import ClassificationProblem, JointOptimizer, MetaConfig, Splits, UsageError
from ift_tune.hyper import (
    ClassWeights,
    Compose,
    HyperKind,
    LabelSmoothing,
    LossMixture,
    PositionWeights,
)
from ift_tune.hyper.supervised import SupervisedProblem

LABELS = 3
WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


class Labelled(SupervisedProblem):
    """A loss for each label."""

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)


class Meant(Labelled):
    """A loss for each example: the mean over its labels."""

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        losses = super().prediction_loss(outputs, targets, "none").mean(dim=1)
        return losses if reduction == "none" else losses.mean()


def rows(examples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, 5, generator=generator)
    targets = (inputs[:, :LABELS] > -0.5).float()
    targets[0] = 1.0
    return inputs, targets


def problem(
    make: type[SupervisedProblem], kind: HyperKind, examples: int, *layers: nn.Module
) -> SupervisedProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, LABELS), *layers)
    return make(model, kind, Splits(*[[rows(examples)]] * 4))


@pytest.mark.parametrize("examples", [LABELS, 8])
def test_class_weights_weigh_each_label(examples: int) -> None:
    found = problem(Labelled, ClassWeights(LABELS, init=WEIGHTS), examples)
    inputs, targets = rows(examples)
    losses = F.binary_cross_entropy_with_logits(found.model(inputs), targets, reduction="none")
    torch.testing.assert_close(found.train_loss((inputs, targets)), (losses * WEIGHTS).mean())


def test_class_weights_of_other_labels_are_refused() -> None:
    with pytest.raises(UsageError, match="made for 2 classes"):
        problem(Labelled, ClassWeights(2), 8).train_loss(rows(8))


@pytest.mark.parametrize(
    ("kind", "make", "mend"),
    [
        (lambda: LabelSmoothing(LABELS), Labelled, r"LabelSmoothing\(2\)"),
        (lambda: LabelSmoothing(LABELS), Meant, r"LabelSmoothing\(2\)"),
        (lambda: ClassWeights(LABELS), Meant, r"PositionWeights\(3\)"),
        (lambda: LossMixture(), Labelled, "losses of each label"),
    ],
)
@pytest.mark.parametrize("learned", [True, False])
def test_what_reads_a_distribution_refuses_labels(
    kind: Callable[[], HyperKind], make: type[SupervisedProblem], mend: str, learned: bool
) -> None:
    made = kind().requires_grad_(learned)
    name = type(made).__name__
    told = rf"{name} must have .*Unflatten\(1, \(1, 3\)\).*{mend}.*sums of . to 3"
    with pytest.raises(UsageError, match=told):
        problem(make, made, 8).train_loss(rows(8))


def test_labels_are_found_in_a_later_batch() -> None:
    inputs, targets = rows(8)
    first = inputs, torch.eye(LABELS)[torch.arange(8) % LABELS]
    found = problem(Meant, LabelSmoothing(LABELS), 8)
    found.train_loss(first)
    found.hyper.requires_grad_(False)
    found.train_loss((inputs, targets))  # as in an inner step, where values cost
    found.hyper.requires_grad_(True)
    with pytest.raises(UsageError, match="several labels at once"):
        found.train_loss((inputs, targets))


def test_one_of_several_labels_is_a_distribution() -> None:
    inputs, _ = rows(8)
    targets = torch.eye(LABELS)[torch.arange(8) % LABELS]
    found = problem(Labelled, LabelSmoothing(LABELS, init=0.3), 8)
    expected = F.binary_cross_entropy_with_logits(found.model(inputs), 0.7 * targets + 0.1)
    torch.testing.assert_close(found.train_loss((inputs, targets)), expected)


def test_a_mixture_refuses_a_loss_for_each_label() -> None:
    targets = torch.eye(LABELS)[torch.arange(8) % LABELS]
    with pytest.raises(UsageError, match=r"a loss for each answer.*got shape \(8, 3\)"):
        problem(Labelled, LossMixture(), 8).train_loss((rows(8)[0], targets))


def test_the_mend_smooths_and_weighs_each_label() -> None:
    kinds = {
        "smoothing": LabelSmoothing(2, init=0.2),
        "weights": PositionWeights(LABELS, init=WEIGHTS),
    }
    layer = nn.Unflatten(1, (1, LABELS))
    found = problem(ClassificationProblem, Compose(kinds), LABELS, layer)
    inputs, targets = rows(LABELS)
    logits = found.model(inputs).squeeze(1)
    losses = F.binary_cross_entropy_with_logits(logits, 0.8 * targets + 0.1, reduction="none")
    torch.testing.assert_close(found.train_loss((inputs, targets)), (losses * WEIGHTS).mean())
    plain = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(found.val_loss((inputs, targets)), plain)
    assert JointOptimizer(found, MetaConfig(inner_steps=2)).step()["val_loss"] > 0.0


def test_class_weights_of_labels_are_learned() -> None:
    kind = ClassWeights(LABELS)
    joint = JointOptimizer(problem(Labelled, kind, LABELS), MetaConfig(inner_steps=5))
    before = kind().detach().clone()
    joint.step()
    assert bool((kind() != before).all())
