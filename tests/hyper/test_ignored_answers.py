"""Kinds that weigh examples where some answers do not count: each sees its own mean loss."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune.base.errors import UsageError
from ift_tune.hyper import (
    ClassWeights,
    Compose,
    DomainWeights,
    ExampleScorer,
    ExampleWeights,
    HyperKind,
    LabelSmoothing,
    LossMixture,
    PositionWeights,
)
from ift_tune.hyper.answers import example_losses

CLASSES, PLACES, TEXTS = 4, 6, 8
REAL = torch.empty(0, dtype=torch.float64)
SOURCES = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
KINDS: dict[str, Any] = {
    "examples": lambda: ExampleWeights(TEXTS, like=REAL),
    "sources": lambda: DomainWeights(SOURCES, answers=[6, 6, 1, 2, 3, 1, 4, 2], like=REAL),
    "classes": lambda: ClassWeights(CLASSES, like=REAL),
    "positions": lambda: PositionWeights(PLACES, like=REAL),
    "smoothing": lambda: LabelSmoothing(CLASSES, like=REAL),
    "mixture": lambda: LossMixture(like=REAL),
    "by inputs": lambda: ExampleScorer(3 * PLACES, hidden=2, like=REAL),
    "by loss": lambda: ExampleScorer(sees="loss", hidden=2, like=REAL),
}
KINDS["all"] = lambda: Compose({name: make() for name, make in list(KINDS.items())[:-1]})


def moved(kind: HyperKind) -> HyperKind:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.add_(torch.randn_like(parameter))
    return kind


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Return texts of unequal lengths, one without any answer that counts."""
    torch.manual_seed(0)
    inputs = torch.randn(TEXTS, 3, PLACES, dtype=torch.float64)
    targets = torch.randint(CLASSES, (TEXTS, PLACES))
    lengths = torch.tensor([6, 5, 1, 3, 0, 2, 6, 1])
    ignored = torch.arange(PLACES) >= lengths.unsqueeze(1)
    return inputs, targets.masked_fill(ignored, -100), torch.arange(TEXTS)


def made(hyper: HyperKind, batch: Any) -> ift_tune.ClassificationProblem:
    torch.manual_seed(1)
    model = nn.Conv1d(3, CLASSES, 1).double()
    return ift_tune.ClassificationProblem(model, hyper, ift_tune.Splits(*[[batch]] * 4))


def own_losses(problem: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return each text's mean loss, and how many of its answers count, in plain words."""
    inputs, targets, _ = batch
    each = F.cross_entropy(problem.model(inputs), targets, reduction="none")  # 0 if ignored
    counts = (targets != -100).sum(dim=1)
    return each.sum(dim=1) / counts.clamp(min=1), counts


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 5), tuple(range(1, TEXTS))])
@pytest.mark.parametrize("name", KINDS)
def test_the_losses_of_parts_add_up_to_that_of_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    batch = texts()
    problem = made(moved(KINDS[name]()), batch)
    parts = [tuple(part) for part in zip(*[t.tensor_split(cuts) for t in batch], strict=True)]
    sizes = [float(problem.loss_size(part)) for part in parts]
    losses = [problem.train_loss(part) for part in parts]
    found = sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    torch.testing.assert_close(found, problem.train_loss(batch), rtol=1e-13, atol=0.0)


def test_a_scorer_sees_each_examples_own_mean_loss() -> None:
    batch = texts()
    scorer = moved(ExampleScorer(sees="loss", like=REAL))
    problem = made(scorer, batch)
    losses, counts = own_losses(problem, batch)
    wanted = (scorer.weigh(losses, None) * counts).sum() / counts.sum()
    torch.testing.assert_close(problem.train_loss(batch), wanted)
    _, told = problem.example_losses(batch)
    torch.testing.assert_close(told, losses)


@pytest.mark.parametrize("neighbours", [1, 3, 20])
def test_neighbours_without_a_label_change_nothing(neighbours: int) -> None:
    problem = made(moved(ExampleScorer(sees="loss", like=REAL)), texts())
    problem.model = nn.Linear(3, CLASSES).double()
    inputs, targets = torch.randn(1 + neighbours, 3).double(), torch.full((1 + neighbours,), -100)
    targets[0] = 1
    alone = problem.train_loss((inputs[:1], targets[:1]))
    torch.testing.assert_close(problem.train_loss((inputs, targets)), alone)


@pytest.mark.parametrize("told", ["answers", "shares"])
def test_the_loss_is_the_mixture_of_the_sources_mean_losses_over_answers(told: str) -> None:
    inputs, targets, index = texts()
    counts = (targets != -100).sum(dim=1)
    if told == "answers":
        kind, third = DomainWeights(SOURCES, answers=counts, like=REAL), index
    else:
        shares = torch.zeros(2).long().index_add(0, SOURCES, counts).tolist()
        kind, third = DomainWeights(shares=shares, like=REAL), SOURCES
    moved(kind)
    problem = made(kind, (inputs, targets, third))
    means = [problem.val_loss((inputs[d == SOURCES], targets[d == SOURCES])) for d in range(2)]
    found = problem.train_loss((inputs, targets, third))
    torch.testing.assert_close(found, (kind() * torch.stack(means)).sum())


def test_sources_of_unequal_texts_are_said(caplog: pytest.LogCaptureFixture) -> None:
    batch = texts()
    counts = (batch[1] != -100).sum(dim=1)
    full = (batch[0], batch[1].clamp(min=0), batch[2])
    for kind, given, said in (
        (DomainWeights(SOURCES, answers=counts, like=REAL), batch, 0),
        (DomainWeights(SOURCES, like=REAL), full, 0),
        (Compose({"mix": DomainWeights(SOURCES, like=REAL)}), batch, 1),
    ):
        caplog.clear()
        problem = made(kind, given)
        with caplog.at_level(logging.WARNING):
            problem.train_loss(given)
            problem.train_loss(given)
        assert caplog.text.count("say how many by answers=") == said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"answers": [1, 2]}, "for each of the 8 training examples"),
        ({"answers": [-1] + [1] * 7}, "at least 0"),
        ({"answers": "many"}, "must be a list"),
        ({"answers": ["x"] * 8}, "answers must be a number for each training example"),
        ({"answers": [1] * 3 + [0] * 5}, "leave out source 'source_1'"),
    ],
)
def test_wrong_numbers_of_answers_are_refused(arguments: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        DomainWeights(SOURCES, **arguments)
    with pytest.raises(UsageError, match="let the shares be of answers"):
        DomainWeights(shares=[1, 2], answers=[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("places", [1, 3, 7, 97])
def test_where_all_count_the_numbers_are_those_of_the_plain_mean(
    places: int, dtype: torch.dtype
) -> None:
    """To the last digit: a device that is not waited for has a mask there, with nothing in it."""
    torch.manual_seed(0)
    losses = torch.rand(13, places, dtype=dtype)
    found = example_losses(losses, 13, torch.ones_like(losses, dtype=torch.bool))
    assert found.shares is not None
    assert torch.equal(found.shares, torch.ones(13, dtype=dtype))
    assert torch.equal(found.losses, losses.sum(dim=1) * (13 / losses.new_tensor(13 * places)))
    plain = example_losses(losses, 13)
    assert plain.shares is None
    assert torch.equal(plain.losses, losses.mean(dim=1))


def test_long_batches_are_counted_in_half_precision_too() -> None:
    losses = torch.ones(70, 1000, dtype=torch.float16)  # 70,000 answers; float16 ends at 65,504
    counted = torch.ones_like(losses, dtype=torch.bool)
    counted[0, 500:] = False
    found = example_losses(losses, 70, counted)
    torch.testing.assert_close(found.mean(), losses.new_tensor(1.0))


def test_the_target_that_does_not_count_is_an_argument() -> None:
    model = nn.Conv2d(1, 3, 1)
    inputs, targets = torch.randn(2, 1, 2, 2), torch.tensor([[[0, 255], [2, 1]]] * 2)
    splits = ift_tune.Splits(*[[(inputs, targets)]] * 4)
    problem = ift_tune.ClassificationProblem(
        model, ift_tune.WeightDecay(model), splits, ignore_index=255
    )
    expected = nn.functional.cross_entropy(model(inputs), targets, ignore_index=255)
    torch.testing.assert_close(problem.train_loss((inputs, targets)), expected)
    wrong: Any = "255"
    with pytest.raises(UsageError, match="ignore_index must be an integer, got '255'"):
        ift_tune.ClassificationProblem(
            model, ift_tune.WeightDecay(model), splits, ignore_index=wrong
        )
