"""Classification, regression and what they share: losses by the textbook, λ shown alike."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import Batches, BilevelProblem, JointOptimizer, MetaConfig, Splits, UsageError
from ift_tune.hyper import Compose, DropoutRates, DropoutSite, ExampleWeights, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem, RegressionProblem, SupervisedProblem
from ift_tune.testing import check_hypergradient


def classifier() -> tuple[ClassificationProblem, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    hyper = Compose(
        {
            "examples": ExampleWeights(6, init=0.25, like=model.weight),
            "decay": WeightDecay(model, "tensor", init=0.5),
        }
    )
    rows = torch.randn(6, 3).double(), torch.randint(4, (6,)), torch.arange(6)
    return ClassificationProblem(model, hyper, splits(Batches(*rows))), rows


def regression(columns: int = 1, flat: bool = True) -> RegressionProblem:
    torch.manual_seed(0)
    inputs = torch.randn(20, 3)
    targets = inputs @ torch.randn(3, columns)
    layers = [nn.Linear(3, columns), *([nn.Flatten(0)] if flat else [])]
    model = nn.Sequential(*layers)
    rows = Batches(inputs, targets[:, 0] if flat else targets, torch.arange(20))
    return RegressionProblem(model, WeightDecay(model), splits(rows))


def splits(loader: Batches) -> Splits:
    return Splits(loader, loader, loader, loader)


class LogisticProblem(SupervisedProblem):
    """A loss of one's own."""

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)


def logistic() -> LogisticProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    rows = Batches(torch.randn(6, 3), torch.tensor([0.0, 1.0] * 3), torch.arange(6))
    decay = WeightDecay(model, "tensor", init=0.1)
    hyper = Compose({"examples": ExampleWeights(6), "decay": decay})
    return LogisticProblem(model, hyper, splits(rows))


def test_classification_losses_are_the_textbooks() -> None:
    problem, (inputs, targets, index) = classifier()
    logits = problem.model(inputs)
    plain = F.cross_entropy(logits, targets)
    batch = (inputs, targets, index)
    assert torch.allclose(problem.train_loss(batch), 0.25 * plain)
    assert torch.equal(problem.val_loss(batch), plain)
    found = problem.metrics((inputs, targets))
    assert torch.equal(found["loss"], plain)
    assert float(found["error"]) == pytest.approx(
        sum(int(a) != int(b) for a, b in zip(logits.argmax(1), targets, strict=True)) / 6
    )


@pytest.mark.parametrize(("columns", "flat"), [(1, True), (2, False)])
def test_regression_losses_are_the_mean_squared_error(columns: int, flat: bool) -> None:
    problem = regression(columns, flat)
    (batch,) = problem.splits.train
    mean = (problem.model(batch[0]) - batch[1]).square().mean()
    for loss in (problem.train_loss(batch), problem.val_loss(batch)):
        torch.testing.assert_close(loss, mean)
    assert set(problem.metrics(batch)) == {"loss"}


def test_many_answers_to_an_example_count_as_one() -> None:
    problem = regression(columns=2, flat=False)
    problem.hyper = ExampleWeights(20, init=lambda raw: raw.copy_(torch.linspace(-2.0, 2.0, 20)))
    (batch,) = problem.splits.train
    inputs, targets, _ = batch
    each = (problem.model(inputs) - targets).square().mean(dim=1)
    expected = (each * problem.hyper()).mean()
    torch.testing.assert_close(problem.train_loss(batch), expected)


@pytest.mark.parametrize("make", [lambda: classifier()[0], regression, logistic])
def test_what_lambda_has_learned_is_shown_by_every_problem(make: Any) -> None:
    problem: SupervisedProblem = make()
    assert problem.words() == problem.hyper.words() != ""
    assert problem.summary() == problem.hyper.summary() != {}
    assert [view.title for view in problem.views()] == [
        view.title for view in problem.hyper.views()
    ]
    assert problem.views() != []


@pytest.mark.parametrize("make", [lambda: classifier()[0], regression])
def test_the_penalty_is_that_of_the_hyperparameters(make: Any) -> None:
    problem: SupervisedProblem = make()
    penalty, weights = problem.penalty(), problem.weights()
    assert penalty is not None
    strength = 0.5 if isinstance(problem, ClassificationProblem) else 1e-3
    expected = strength * sum(float(w.detach().square().sum()) for w in weights)
    assert float(penalty.value(weights).detach()) == pytest.approx(expected)


def test_hyperparameters_inside_the_model_act_in_training_alone() -> None:
    problem = regression()
    problem.hyper = DropoutRates(problem.model, {"0": DropoutSite()}, init=0.5)
    (batch,) = problem.splits.train
    assert not torch.equal(problem.train_loss(batch), problem.train_loss(batch))
    assert torch.equal(problem.val_loss(batch), problem.val_loss(batch))


def test_the_hypergradient_through_a_loss_of_ones_own_is_right() -> None:
    assert check_hypergradient(logistic()).passed


def test_shapes_that_would_broadcast_are_refused() -> None:
    problem = regression()
    inputs, targets, index = next(iter(problem.splits.train))
    for loss in (problem.train_loss, problem.val_loss):
        with pytest.raises(UsageError, match="Flatten"):
            loss((inputs, targets[:, None], index))


def test_example_weights_need_an_index() -> None:
    problem, (inputs, targets, _) = classifier()
    with pytest.raises(UsageError, match="index"):
        problem.train_loss((inputs, targets))


@pytest.mark.parametrize("kind", [ClassificationProblem, RegressionProblem])
def test_a_module_that_is_no_kind_is_refused(kind: Any) -> None:
    with pytest.raises(UsageError, match="got Linear; for a module of your own, subclass Bilevel"):
        kind(nn.Linear(2, 2), nn.Linear(1, 1), splits(Batches(torch.zeros(1))))


def test_the_base_is_abstract() -> None:
    kind: Any = SupervisedProblem
    with pytest.raises(TypeError, match="prediction_loss"):
        kind(nn.Linear(2, 2), ExampleWeights(1), splits(Batches(torch.zeros(1))))


def test_a_problem_of_ones_own_says_what_its_kind_has_learned() -> None:
    rows = Batches(torch.randn(6, 4), torch.randint(3, (6,)))

    class Own(BilevelProblem):
        def __init__(self, hyper: nn.Module) -> None:
            self.model, self.hyper = nn.Linear(4, 3), hyper
            self.splits = Splits(rows, rows, rows, rows)

        def train_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        val_loss = train_loss

    kind = WeightDecay(nn.Linear(4, 3), per="tensor")
    told = Own(kind)
    assert told.summary() == kind.summary() != {}
    assert told.words() == kind.words() != ""
    assert [view.title for view in told.views()] == [view.title for view in kind.views()] != []
    plain = Own(nn.ParameterList([torch.zeros(3)]))
    assert (plain.summary(), plain.words(), plain.views()) == ({}, "", [])


def test_positions_matter_to_the_kinds_whose_hooks_take_them() -> None:
    decay, weights = WeightDecay(nn.Linear(2, 1)), ExampleWeights(4)
    taken = [kind.takes_index for kind in (decay, weights)]
    both = Compose({"decay": decay, "weights": weights})
    assert [*taken, both.takes_index, Compose({"decay": decay}).takes_index] == [
        *(False, True),
        *(True, False),
    ]


def test_four_loaders_in_a_tuple_are_no_splits() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"splits must be Splits\(train=.* got a tuple"):
        ClassificationProblem(model, WeightDecay(model), ([], [], [], []))  # type: ignore[arg-type]


def test_a_model_that_is_frozen_as_a_whole_is_said_to_be() -> None:
    model = nn.Linear(2, 2)
    hyper = WeightDecay(model)
    model.requires_grad_(False)
    batch = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    problem = ClassificationProblem(model, hyper, Splits(*[[batch]] * 4))
    with pytest.raises(UsageError, match=r"frozen parameters alone: call requires_grad_\(\)"):
        JointOptimizer(problem, MetaConfig())
