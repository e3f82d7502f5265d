"""Targets of every form are right, in training and validation alike, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ift_tune import Batches, JointOptimizer, MetaConfig, Splits, UsageError
from ift_tune.hyper import (
    ClassWeights,
    ExampleWeights,
    HyperKind,
    LabelSmoothing,
    LossMixture,
    WeightDecay,
    answers,
    predictions,
)
from ift_tune.hyper.answers import may_read
from ift_tune.hyper.supervised import ClassificationProblem, RegressionProblem

torch.manual_seed(0)
LOGITS = torch.randn(4, 3, 5, dtype=torch.float64)
LABELS = torch.randint(3, (4, 5))
PADDED = LABELS.masked_fill(torch.arange(5) >= torch.tensor([[5], [2], [0], [3]]), -100)


class Given(nn.Module):
    """Answers what it is given, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


def problem(hyper: HyperKind | None = None) -> ClassificationProblem:
    model, rows = Given(), Batches(LOGITS, PADDED)
    kind = hyper or WeightDecay(model, "tensor")
    return ClassificationProblem(model, kind, Splits(rows, rows, rows, rows))


def test_padding_counts_nowhere() -> None:
    kept = PADDED != -100
    loss, wrong = F.cross_entropy(LOGITS, PADDED), (LOGITS.argmax(1) != LABELS)[kept].float().mean()
    found = problem()
    for value in (found.train_loss((LOGITS, PADDED)), found.val_loss((LOGITS, PADDED))):
        torch.testing.assert_close(value, loss)
    measured = found.metrics((LOGITS, PADDED))
    torch.testing.assert_close(measured["error"], wrong)
    for size in (1, 3, 4):
        loader = [(LOGITS[i : i + size], PADDED[i : i + size]) for i in range(0, 4, size)]
        found.splits = Splits(loader, loader, loader, loader)
        row = JointOptimizer(found, MetaConfig()).evaluate("search")
        assert row == pytest.approx({"search_loss": float(loss), "search_error": float(wrong)})


def test_example_weights_weigh_what_is_labelled() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    kind = ExampleWeights(4, init=lambda raw: raw.copy_(weights.logit()), like=LOGITS)
    each = F.cross_entropy(LOGITS, PADDED, reduction="none")
    expected = (each * weights[:, None]).sum() / (PADDED != -100).sum()
    loss = problem(kind).train_loss((LOGITS, PADDED, torch.arange(4)))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", [ClassWeights(3), LabelSmoothing(3), LossMixture()])
def test_criteria_do_not_see_padding(kind: HyperKind) -> None:
    kept = (PADDED != -100).flatten()
    rows = LOGITS.transpose(1, 2).flatten(0, 1)[kept], PADDED.flatten()[kept]
    whole = problem(kind.double())
    torch.testing.assert_close(whole.train_loss((LOGITS, PADDED)), whole.train_loss(rows))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 2)])
@pytest.mark.parametrize("chances", [False, True])
def test_a_single_logit_is_binary(shape: tuple[int, ...], chances: bool) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    targets = torch.rand(shape, dtype=torch.float64)
    targets = targets if chances else targets.round()
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    given = targets if chances else targets.long()
    found = problem()
    for value in (found.train_loss((logits, given)), found.val_loss((logits, given))):
        torch.testing.assert_close(value, expected)
    error = ((logits > 0) != (targets > 0.5)).float().mean()
    torch.testing.assert_close(found.metrics((logits, given))["error"], error)


def test_soft_targets_are_probabilities() -> None:
    soft = torch.rand(4, 3, 5, dtype=torch.float64).softmax(1)
    expected = -(soft * LOGITS.log_softmax(1)).sum(1).mean()
    for value in (problem().train_loss((LOGITS, soft)), problem().val_loss((LOGITS, soft))):
        torch.testing.assert_close(value, expected)
    error = (LOGITS.argmax(1) != soft.argmax(1)).float().mean()
    torch.testing.assert_close(problem().metrics((LOGITS, soft))["error"], error)


ROWS = LOGITS[:, :, 0]


@pytest.mark.parametrize(
    ("outputs", "targets", "told"),
    [
        (ROWS, torch.tensor([0, 1, 2, 3]), "0 to 2.*got 0 to 3"),
        (ROWS, torch.tensor([0, -1, 2, -100]), "0 to 2.*got -1 to 2"),
        (ROWS, torch.tensor([0.0, 1.0, 2.0, 1.0]), r"targets.long\(\), got torch.float32"),
        (ROWS, torch.tensor([[0], [1], [2], [1]]), r"shape \(4,\).*got \(4, 1\)"),
        (ROWS, torch.eye(3)[[0, 1, 2, 0]] + torch.eye(3)[[1, 1, 0, 0]], "several labels"),
        (ROWS, torch.eye(3).long()[[0, 1, 2, 0]], "several labels.*int64"),
        (ROWS[:, :1], torch.tensor([0.0, 1.0, 2.0, 0.5]), "single logit.*got 0 to 2"),
        (LOGITS, LABELS[:, :4], r"got \(4, 4\)"),
    ],
)
def test_any_other_form_is_refused(outputs: Tensor, targets: Tensor, told: str) -> None:
    for use in (problem().train_loss, problem().val_loss, problem().metrics):
        with pytest.raises(UsageError, match=told):
            use((outputs, targets))


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ([4, 5, 6, 7], "0 to 3.*got 4 to 7"),
        ([0, 1, 2, -1], "got -1 to 2"),
        ([0.0, 1.0, 2.0, 3.0], "got torch.float32"),
        ([0, 1], r"shape \(4,\).*got torch.int64 of shape \(2,\)"),
        ([0, 1, 1, 2], "one index and other targets.*index 1 twice"),
    ],
)
def test_an_index_of_another_split_is_refused(index: list[float], told: str) -> None:
    found = problem(ExampleWeights(4))
    with pytest.raises(UsageError, match=told):
        found.train_loss((ROWS, torch.tensor([0, 1, 2, 0]), torch.tensor(index)))


def test_regression_takes_real_numbers_of_the_outputs_shape() -> None:
    rows = Batches(ROWS, ROWS)
    found = RegressionProblem(Given(), WeightDecay(Given()), Splits(rows, rows, rows, rows))
    for targets, told in ((ROWS[:, :1], r"\(4, 1\)"), (ROWS.long(), r"float\(\), got torch.int64")):
        for use in (found.train_loss, found.val_loss, found.metrics):
            with pytest.raises(UsageError, match=told):
                use((ROWS, targets))


class NoReading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what makes a CPU wait for a GPU: numbers read from tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)
        assert func.overloadpacket not in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (LOGITS, PADDED),
        (LOGITS, LABELS),
        (LOGITS, LOGITS.softmax(1)),
        (LOGITS[:, 0, 0], torch.tensor([0, 1, -100, 1])),
        (LOGITS[:, 0, 0], torch.tensor([0.0, 0.3, -100.0, 1.0])),
    ],
)
def test_inner_steps_on_a_gpu_read_nothing_and_train_alike(
    outputs: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problem(ExampleWeights(4))
    batch = outputs, targets, torch.arange(4)
    loss = found.train_loss(batch)  # the first: it is read
    monkeypatch.setattr(answers, "may_read", lambda *_: False)
    monkeypatch.setattr(predictions, "may_read", lambda *_: False)
    with NoReading():  # type: ignore[no-untyped-call]
        again = found.train_loss(batch)
    torch.testing.assert_close(again, loss)


@pytest.mark.parametrize(
    ("targets", "index"),
    [
        (LABELS + 1, [0, 1, 2, 3]),
        (LABELS - 1, [0, 1, 2, 3]),
        (2.0 * LOGITS.softmax(1), [0, 1, 2, 3]),
        (LABELS, [0, 1, 2, 4]),
        (LABELS, [0, 1, 2, -1]),
    ],
)
def test_what_is_not_read_does_not_pass_in_silence(
    targets: Tensor, index: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problem(ExampleWeights(4))
    found.train_loss((LOGITS, LABELS, torch.arange(4)))
    monkeypatch.setattr(answers, "may_read", lambda *_: False)
    monkeypatch.setattr(predictions, "may_read", lambda *_: False)
    try:
        loss = found.train_loss((LOGITS, targets, torch.tensor(index)))
    except IndexError:  # on a GPU, the kernel's assertion
        return
    assert torch.isnan(loss)


def test_outer_steps_and_evaluations_read() -> None:
    hyper, elsewhere = ExampleWeights(4), torch.ones(1, device="meta")
    assert may_read(elsewhere, hyper)
    hyper.requires_grad_(False)  # as in an inner step
    assert not may_read(elsewhere, hyper)
    assert may_read(torch.ones(1), hyper)
