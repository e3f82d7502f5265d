"""In which form a model's own loss takes what it predicts: told by gradients, and decided once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    ClassificationProblem,
    ClassWeights,
    RegressionProblem,
    Splits,
    WeightDecay,
)
from ift_tune.base.errors import UsageError
from ift_tune.hyper.own_loss import SUCCESSORS, explaining

WORDS = 5


class Language(nn.Module):
    """Computes the loss of each token's successor, or of each token."""

    def __init__(self, scale: float = 1.0, shifted: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(scale * torch.randn(WORDS, WORDS, generator=generator))
        self.shifted = shifted
        self.calls = 0
        self.added = 0.0
        self.compiled = False

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        logits = F.one_hot(ids, WORDS).to(self.table.dtype) @ self.table
        if labels is None:
            return {"logits": logits}
        ahead, behind = (logits[:, :-1], labels[:, 1:]) if self.shifted else (logits, labels)
        loss = F.cross_entropy(ahead.flatten(0, 1).float(), behind.flatten())
        # A compiled model returns both from one function: no graph leads from one to the other.
        shown = logits * 1.0 if self.compiled else logits
        return {"logits": shown, "loss": loss + self.added}


def texts(examples: int = 6, length: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (examples, length), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "labels": ids.clone()}


def problem_of(model: Language, data: dict[str, Tensor], kind: Any = None) -> ClassificationProblem:
    batches = Batches(data, batch_size=3, shuffle=False)
    hyper = kind or ClassWeights(WORDS, init=1.0)
    return ClassificationProblem(model, hyper, Splits(*[batches] * 4))


def gradient(model: Language, data: dict[str, Tensor], kind: Any = None) -> Tensor:
    loss = problem_of(model, data, kind).train_loss(data)
    (found,) = torch.autograd.grad(loss, [model.table])
    return found


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_class_weights_of_one_leave_the_models_own_loss(
    half: bool, scale: float, shifted: bool
) -> None:
    data = texts()
    data["labels"][:2, 3:] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        own = gradient(Language(scale, shifted), data, WeightDecay(nn.Linear(1, 1)))
        found = gradient(Language(scale, shifted), data)
    torch.testing.assert_close(found, own, rtol=0.0, atol=2e-2 if half else 1e-6)


def forms_by_hand() -> dict[str, tuple[Tensor, Tensor, Any]]:
    square = torch.zeros(3, WORDS, WORDS)  # as many tokens as classes, predicted alike
    words = texts(3)["labels"]
    return {
        "as they are": (square, words, lambda o, t: F.cross_entropy(o, t)),
        "classes last": (square, words, lambda o, t: F.cross_entropy(o.movedim(-1, 1), t)),
        SUCCESSORS: (
            square,
            words,
            lambda o, t: F.cross_entropy(o[:, :-1].movedim(-1, 1), t[:, 1:]),
        ),
    }


@pytest.mark.parametrize("name", forms_by_hand())
def test_each_form_is_told_from_the_others_though_all_is_predicted_alike(name: str) -> None:
    outputs, targets, loss = forms_by_hand()[name]
    outputs.requires_grad_()
    assert explaining(outputs, loss(outputs, targets), targets, F.cross_entropy) == [name]


def test_a_column_is_told() -> None:
    outputs = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(4.0)
    problem = RegressionProblem(
        model := nn.Linear(1, 1), WeightDecay(model), Splits(*[[(outputs.detach(), targets)]] * 4)
    )
    own = F.mse_loss(outputs.squeeze(-1), targets)
    mean = lambda o, t: problem.mean_loss(problem.answers(o, t))  # noqa: E731
    assert explaining(outputs, own, targets, mean) == ["one column"]
    assert explaining(outputs, 1.1 * own, targets, mean) == []


def test_it_is_decided_once() -> None:
    data, model = texts(), Language()
    problem = problem_of(model, data)
    for _ in range(3):
        problem.train_loss(data)
        problem.metrics(data)
        problem.loss_size(data)
    assert model.calls == 3 + 3 + 1


def test_training_is_left_alone_by_the_decision() -> None:
    data, model = texts(), Language()
    model.train()
    state = torch.random.get_rng_state()
    problem_of(model, data).loss_size(data)
    assert model.training
    assert model.table.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("case", ["nothing counts", "compiled and all alike"])
def test_what_nobody_can_tell_is_asked_again(case: str) -> None:
    data, model = texts(), Language()
    problem = problem_of(model, data)
    if case == "nothing counts":
        problem.loss_size({**data, "labels": torch.full_like(data["labels"], -100)})
    else:
        model.compiled = True
        table = model.table.data.clone()
        model.table.data.zero_()
        problem.loss_size(data)
        model.table.data.copy_(table)
    assert problem.loss_size(data) == data["labels"][:, 1:].numel()
    calls = model.calls
    problem.loss_size(data)
    assert model.calls == calls


def test_what_is_added_to_the_loss_later_is_refused() -> None:
    data, model = texts(), Language()
    problem = problem_of(model, data)
    problem.train_loss(data)
    model.added = 0.5
    with pytest.raises(UsageError, match="must be the mean of its predictions' losses"):
        problem.train_loss(data)
