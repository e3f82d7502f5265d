"""A problem takes the penalty of its kind by itself, and never twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    BilevelProblem,
    Compose,
    ExampleWeights,
    HyperKind,
    JointOptimizer,
    L1Decay,
    MetaConfig,
    Penalty,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.testing import check_hypergradient

ROWS = 12


class Plain(BilevelProblem):
    """Two losses, and a kind; nothing is said about its penalty."""

    def __init__(self, make: Callable[[nn.Module], nn.Module], *, zero: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        if zero:
            nn.init.zeros_(self.model.weight)
            nn.init.zeros_(self.model.bias)
        self.hyper = make(self.model)
        rows = torch.randn(ROWS, 3), torch.arange(ROWS) % 2, torch.arange(ROWS)
        train = Batches(*rows, batch_size=4)
        val = Batches(rows[0].flip(0), rows[1])
        self.splits = Splits(train, val, val, val)
        self.calls = 0

    def train_loss(self, batch: Any) -> Tensor:
        self.calls += 1
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def val_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


class ByHand(Plain):
    """Adds the value of the penalty itself, as a script without closed forms does."""

    def train_loss(self, batch: Any) -> Tensor:
        loss: Tensor = super().train_loss(batch) + self.hyper()
        return loss


class ByAMultiple(Plain):
    def train_loss(self, batch: Any) -> Tensor:
        loss: Tensor = super().train_loss(batch) + 0.5 * self.hyper()
        return loss


class Said(Plain):
    def penalty(self) -> Penalty | None:
        return self.hyper.penalty()  # type: ignore[operator, no-any-return]


class Silenced(ByAMultiple):
    def penalty(self) -> None:
        return None


def decays(model: nn.Module) -> HyperKind:
    return WeightDecay(model, "channel", init=0.1)


def lone(model: nn.Module) -> HyperKind:
    return WeightDecay(model, "model", init=0.1)


def trained(problem: BilevelProblem) -> list[Tensor]:
    joint = JointOptimizer(problem, MetaConfig(inner_steps=3, inner_lr=0.05, meta_lr=0.1))
    for _ in range(3):
        joint.step()
    return [*problem.weights(), *problem.hypers()]


@pytest.mark.parametrize("make", [decays, lone])
@pytest.mark.parametrize("zero", [False, True])
def test_the_penalty_counts_once_said_by_hand_or_not_at_all(
    make: Callable[[nn.Module], HyperKind], zero: bool
) -> None:
    said = trained(Said(make, zero=zero))
    for problem in (Plain(make, zero=zero), ByHand(make, zero=zero)):
        torch.testing.assert_close(trained(problem), said)
    untouched = Plain(make)
    before = untouched.splits.train.generator.get_state()  # type: ignore[attr-defined]
    state = torch.get_rng_state()
    assert isinstance(untouched.penalty(), Penalty)
    assert untouched.calls == 0
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, untouched.splits.train.generator.get_state())  # type: ignore[attr-defined]


def test_a_multiple_of_many_is_left_as_it_is_and_of_one_must_be_said() -> None:
    torch.testing.assert_close(trained(ByAMultiple(decays)), trained(Silenced(decays)))
    with pytest.raises(UsageError, match=r"a method penalty\(self\) .* in another way"):
        trained(ByAMultiple(lone))
    trained(Silenced(lone))


def test_of_a_composition_the_parts_that_are_not_added_by_hand() -> None:
    def make(model: nn.Module) -> HyperKind:
        return Compose(
            {
                "decay": WeightDecay(model, "tensor", init=0.1),
                "rows": ExampleWeights(ROWS),
                "l1": L1Decay(model, "tensor", init=0.05, epsilon=0.1),
            }
        )

    class Mixed(Plain):
        def train_loss(self, batch: Any) -> Tensor:
            losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            kinds: Any = self.hyper
            return kinds.weigh(losses, batch[2]).mean() + kinds["l1"]()  # type: ignore[no-any-return]

    class Whole(Mixed):
        def train_loss(self, batch: Any) -> Tensor:
            loss: Tensor = super().train_loss(batch) - self.hyper["l1"]()  # type: ignore[index]
            return loss

        def penalty(self) -> Penalty | None:
            return self.hyper.penalty()  # type: ignore[operator, no-any-return]

    torch.testing.assert_close(trained(Mixed(make)), trained(Whole(make)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Plain, ByHand])
def test_the_check_sees_the_same_problem(kind: type[Plain]) -> None:
    check_hypergradient(kind(decays), directions=1, unrolled_steps=3)
    seen = kind(decays)
    seen.penalty()
    check_hypergradient(copy.deepcopy(seen), directions=1, unrolled_steps=3)


class Ranks(nn.Module):
    """A module of the user's own, whose penalty is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(2))

    def penalty(self, weights: Tensor) -> Tensor:
        return (self.raw.exp() * weights.square().sum(dim=1)).sum()


def test_a_method_of_another_meaning_is_left_alone() -> None:
    class Own(Plain):
        def train_loss(self, batch: Any) -> Tensor:
            found: Tensor = self.hyper.penalty(self.model.weight)  # type: ignore[operator]
            return super().train_loss(batch) + found

    problem = Own(lambda _: Ranks())
    assert problem.penalty() is None
    trained(problem)


def test_lambda_without_gradients_is_put_back() -> None:
    problem = ByHand(decays)
    for h in problem.hypers():
        h.requires_grad_(False)
    frozen = list(problem.hyper.parameters())
    with torch.no_grad():
        assert problem.penalty() is None
    assert not any(h.requires_grad for h in frozen)
