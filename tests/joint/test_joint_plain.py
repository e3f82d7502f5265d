"""Plain training by the joint optimiser: λ stays, costs are counted, validation data may join."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ift_tune import Batches, ClassificationProblem, JointOptimizer, MetaConfig, Splits, WeightDecay

CONFIG = MetaConfig(inner_steps=3, inner_lr=0.05, inner_optimizer="sgd")


def make(train_batch: int | None = None) -> ClassificationProblem:
    """Return softmax regression in float64: 12 training and 6 validation examples."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (30,), generator=generator)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))

    def rows(start: int, stop: int, size: int | None = None) -> Batches:
        return Batches(inputs[start:stop], targets[start:stop], batch_size=size)

    splits = Splits(rows(0, 12, train_batch), rows(12, 18), rows(18, 24), rows(24, 30))
    return ClassificationProblem(model, WeightDecay(model, init=0.1), splits)


def by_hand(problem: ClassificationProblem, steps: int, *, train_on_val: bool) -> list[Tensor]:
    """Return the weights after gradient descent on the whole objective, written out."""
    inputs, targets = problem.splits.train.tensors  # type: ignore[attr-defined]
    if train_on_val:
        more_inputs, more_targets = problem.splits.val.tensors  # type: ignore[attr-defined]
        inputs, targets = torch.cat([inputs, more_inputs]), torch.cat([targets, more_targets])
    model = copy.deepcopy(problem.model)
    for _ in range(steps):
        weights = list(model.parameters())
        loss = cross_entropy(model(inputs), targets) + 0.1 * sum(w.square().sum() for w in weights)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=CONFIG.inner_lr)
    return list(model.parameters())


@pytest.mark.parametrize("train_on_val", [False, True])
def test_plain_steps_are_gradient_descent_and_leave_the_hyperparameters(train_on_val: bool) -> None:
    problem = make()
    before = [h.detach().clone() for h in problem.hypers()]
    expected = by_hand(problem, 2 * CONFIG.inner_steps, train_on_val=train_on_val)
    joint = JointOptimizer(problem, CONFIG)
    for _ in range(2):
        joint.baseline_step(train_on_val=train_on_val)
    assert (joint.outer_steps, joint.inner_steps) == (2, 6)
    torch.testing.assert_close(problem.weights(), expected, rtol=0.0, atol=1e-14)
    torch.testing.assert_close(problem.hypers(), before, rtol=0.0, atol=0.0)


def trained(problem: ClassificationProblem, steps: int, weigh: tuple[float, float, float]) -> Any:
    """Return the weights after gradient descent on a sum of both losses and the decay."""
    model, splits = copy.deepcopy(problem.model), problem.splits
    both: Any = (splits.train, splits.val)
    tensors = [split.tensors for split in both]
    for _ in range(steps):
        weights = list(model.parameters())
        parts = [cross_entropy(model(x), y, reduction="sum") for x, y in tensors]
        parts.append(0.1 * torch.stack([w.square().sum() for w in weights]).sum())
        loss = sum(factor * part for factor, part in zip(weigh, parts, strict=True))
        gradients = torch.autograd.grad(loss, weights)  # type: ignore[arg-type]
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=CONFIG.inner_lr)
    return list(model.parameters())


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("penalty", [None, 1.0, 2.5])
def test_validation_examples_have_their_weight_and_the_penalty_its_strength(
    weight: float, penalty: float | None
) -> None:
    problem, total = make(), 12.0 + weight * 6.0
    decay = 1.0 if penalty is None else penalty * 12.0 / total
    expected = trained(problem, 6, (1.0 / total, weight / total, decay))
    joint = JointOptimizer(problem, CONFIG)
    for _ in range(2):
        joint.baseline_step(train_on_val=True, val_weight=weight, penalty_weight=penalty)
    torch.testing.assert_close(problem.weights(), expected, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("train_batch", [None, 4])
def test_with_infinite_weight_the_training_examples_are_not_even_drawn(
    train_batch: int | None,
) -> None:
    problem = make(train_batch)
    expected = trained(problem, 6, (0.0, 1.0 / 6.0, 1.0))
    joint = JointOptimizer(problem, CONFIG)
    alone: Any = {"train_on_val": True, "val_weight": math.inf}
    unit = train_batch or 12
    assert joint.max_step_cost(plain=True, **alone) == pytest.approx(3.0 * 6 / unit)
    for _ in range(2):
        found = joint.baseline_step(**alone)
    assert found["gradient_equivalents"] == pytest.approx(6.0 * 6 / unit)
    torch.testing.assert_close(problem.weights(), expected, rtol=0.0, atol=1e-14)
    assert joint.state_dict()["cursors"]["train"]["consumed"] == 0


@pytest.mark.parametrize(
    ("train_batch", "train_on_val", "cost"),
    [(None, False, 3.0), (None, True, 3.0 * 18 / 12), (4, False, 3.0), (4, True, 3.0 * 10 / 4)],
)
def test_each_example_that_is_trained_on_is_paid_for(
    train_batch: int | None, train_on_val: bool, cost: float
) -> None:
    joint = JointOptimizer(make(train_batch), CONFIG)
    assert joint.max_step_cost(plain=True, train_on_val=train_on_val) == pytest.approx(cost)
    assert joint.baseline_step(train_on_val=train_on_val)["gradient_equivalents"] == pytest.approx(
        cost
    )


def test_with_mini_batches_each_example_counts_as_much() -> None:
    problem, whole = make(train_batch=4), make()
    lr, start = CONFIG.inner_lr, [w.detach().clone() for w in problem.weights()]
    joint = JointOptimizer(problem, MetaConfig(inner_steps=1, inner_lr=lr, inner_optimizer="sgd"))
    moved = [torch.zeros_like(w) for w in start]
    for _ in range(3):  # one pass: each of the 12 examples comes once
        with torch.no_grad():
            for weight, first in zip(problem.weights(), start, strict=True):
                weight.copy_(first)
        joint.baseline_step(train_on_val=True)
        for total, weight, first in zip(moved, problem.weights(), start, strict=True):
            total += (weight.detach() - first) / 3
    expected = by_hand(whole, 1, train_on_val=True)
    expected = [weight.detach() - first for weight, first in zip(expected, start, strict=True)]
    torch.testing.assert_close(moved, expected, rtol=0.0, atol=1e-14)


def test_a_resumed_pooled_training_has_the_same_bits() -> None:
    one = JointOptimizer(make(train_batch=5), CONFIG)
    for _ in range(3):
        one.baseline_step(train_on_val=True)
    other = JointOptimizer(make(train_batch=5), CONFIG)
    other.baseline_step(train_on_val=True)
    resumed = JointOptimizer(make(train_batch=5), CONFIG)
    resumed.load_state_dict(other.state_dict())
    for _ in range(2):
        resumed.baseline_step(train_on_val=True)
    torch.testing.assert_close(resumed.problem.weights(), one.problem.weights(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_old_names_warn_and_do_the_same(pooled: bool) -> None:
    old, new = JointOptimizer(make(), CONFIG), JointOptimizer(make(), CONFIG)
    with pytest.warns(DeprecationWarning, match=r"JointOptimizer\.plain_step is now baseline_step"):
        found = old.plain_step(pooled=pooled)
    assert found == new.baseline_step(train_on_val=pooled)
    torch.testing.assert_close(old.problem.weights(), new.problem.weights(), rtol=0.0, atol=0.0)
    with pytest.warns(DeprecationWarning, match="dearest_step is now max_step_cost"):
        cost = old.dearest_step(plain=True, pooled=pooled)
    assert cost == new.max_step_cost(plain=True, train_on_val=pooled)
