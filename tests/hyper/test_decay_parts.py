"""Decays of a part of the model: one that is left out has no decay, and all else is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    ClassificationProblem,
    Compose,
    Dense,
    JointOptimizer,
    L1Decay,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
    hypergradient,
)
from ift_tune.hyper.base import HyperKind
from ift_tune.problem.losses import aligned_penalty
from ift_tune.testing import check_hypergradient

Make = Callable[[nn.Sequential], HyperKind]


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
        self.double()


def problem_of(make: Make) -> ClassificationProblem:
    net = Net()
    rows = Batches(torch.randn(24, 3, dtype=torch.float64), torch.randint(2, (24,)))
    return ClassificationProblem(net, make(net), Splits(rows, rows, rows, rows))


PARTS: dict[str, tuple[Make, set[str]]] = {
    "without biases and norms": (
        lambda net: WeightDecay(net, "tensor", exclude=["bias", "norm"], init=0.1),
        {"0.weight", "3.weight"},
    ),
    "the head": (lambda net: WeightDecay(net[3], "weight", init=0.1), {"3.weight", "3.bias"}),
    "without a module": (
        lambda net: WeightDecay(net, "model", exclude="0", init=0.1),
        {"1.weight", "1.bias", "3.weight", "3.bias"},
    ),
    "a pattern": (
        lambda net: L1Decay(net, "channel", exclude="*.weight", init=0.1, epsilon=0.3),
        {"0.bias", "1.bias", "3.bias"},
    ),
    "a filter": (
        lambda net: WeightDecay(net, "input", exclude=lambda _, p: p.ndim < 2, init=0.1),
        {"0.weight", "3.weight"},
    ),
    "two parts": (
        lambda net: Compose(
            {
                "body": WeightDecay(net[0], "model", init=0.1),
                "head": L1Decay(net[3], "tensor", init=0.2, epsilon=0.3),
            }
        ),
        {"0.weight", "0.bias", "3.weight", "3.bias"},
    ),
    "overlapping parts": (
        lambda net: Compose(
            {"all": WeightDecay(net, "model", init=0.1), "head": WeightDecay(net[3], init=0.2)}
        ),
        {name for name, _ in Net().named_parameters()},
    ),
}


def by_hand(problem: ClassificationProblem) -> Tensor:
    """Return the sum over the kinds of c·g(w), from `decays` and the tensors that they are of."""
    kinds = getattr(problem.hyper, "kinds", {"": problem.hyper}).values()
    total = torch.zeros((), dtype=torch.float64)
    for kind in kinds:
        epsilon = getattr(kind, "epsilon", None)
        for c, w in zip(kind.decays(), kind.layout.weights(), strict=True):
            size = w.square() if epsilon is None else (w.square() + epsilon**2).sqrt() - epsilon
            total = total + (c * size).sum()
    return total


@pytest.mark.parametrize("name", PARTS)
def test_the_part_alone_is_decayed(name: str) -> None:
    make, decayed = PARTS[name]
    problem = problem_of(make)
    names = [n for n, _ in problem.model.named_parameters()]
    penalty = aligned_penalty(problem)
    assert penalty is not None
    weights = problem.weights()
    value = by_hand(problem)
    torch.testing.assert_close(penalty.value(weights), value)
    truth = torch.autograd.grad(value, weights, allow_unused=True)
    assert {n for n, g in zip(names, truth, strict=True) if g is not None} == decayed
    found = [torch.zeros_like(w) for w in weights]
    penalty.add_gradient_(found, weights)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


@pytest.mark.parametrize("name", PARTS)
def test_hypergradients_are_those_of_a_loss_with_the_decay_in_it(name: str) -> None:
    problem = problem_of(PARTS[name][0])
    (batch,) = problem.splits.train
    loss, val = problem.train_loss(batch), problem.val_loss(batch)
    inverse = Dense(damping=1.0)
    args = (val, problem.model, problem.hyper)
    closed = hypergradient(loss, *args, inverse=inverse, penalty=problem.penalty())
    whole = hypergradient(loss + by_hand(problem), *args, inverse=inverse)
    for mine, theirs in zip(closed.grads, whole.grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_part_that_the_loss_does_not_see_is_left_out_of_the_system() -> None:
    net, unseen = Net(), nn.Linear(2, 2).double()
    model = nn.ModuleList([net, unseen])
    rows = torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))
    kinds = WeightDecay(net[0], init=0.1), WeightDecay(unseen, "tensor", init=0.1)
    loss = F.cross_entropy(net(rows[0]), rows[1])
    val = loss + unseen.weight.sum()
    # The first decay is not over the unseen weights: rows of zeros would make H singular.
    result = hypergradient(loss, val, model, kinds[0], inverse=Dense(), penalty=kinds[0].penalty())
    assert all(bool(g.isfinite().all()) for g in result.grads)
    both = Compose({"net": kinds[0], "unseen": kinds[1]})
    result = hypergradient(loss, val, model, both, inverse=Dense(), penalty=both.penalty())
    # At w ≠ 0 of the unseen part alone: H = 2c, v = 1, the mixed term 2w·c′.
    raw, weight = kinds[1].raw[0], unseen.weight.detach()
    slope = kinds[1].transform.derivative(raw.detach())
    strength = kinds[1].transform.forward(raw.detach())
    place = [id(p) for p in both.parameters()].index(id(raw))
    expected = -(weight / strength).sum() * slope
    torch.testing.assert_close(result.grads[place], expected)


def test_the_check_takes_parts() -> None:
    # All weights are decayed, some by two: without a decay, a net has no single minimum.
    assert check_hypergradient(problem_of(PARTS["overlapping parts"][0]), directions=1).passed


def test_what_is_left_out_is_trained_without_a_decay() -> None:
    problem = problem_of(PARTS["the head"][0])
    hyper = problem.hyper
    assert isinstance(hyper, WeightDecay)
    with torch.no_grad():
        for raw in hyper.raw:
            raw.fill_(50.0)  # a decay so strong that a step of plain descent overshoots
    before = [w.detach().clone() for w in problem.weights()]
    (batch,) = problem.splits.train
    truth = torch.autograd.grad(problem.train_loss(batch), problem.weights())
    config = MetaConfig(inner_steps=1, inner_lr=1e-3, inner_optimizer="sgd", meta_lr=1e-9)
    JointOptimizer(problem, config).step()
    for w, b, g, decayed in zip(problem.weights(), before, truth, [0, 0, 0, 0, 1, 1], strict=True):
        expected = b - 1e-3 * (g + decayed * 2.0 * 50.0 * b)
        torch.testing.assert_close(w.detach(), expected)


def test_per_input_has_one_for_each_feature() -> None:
    net = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Linear(4, 2))
    kind = WeightDecay(net, "input", init=0.5)
    assert [tuple(raw.shape) for raw in kind.raw] == [(1, 3, 1), (), (1, 4), ()]
    weights = [w.detach().clone().requires_grad_() for w in net.parameters()]
    values = kind.decays()
    total = torch.stack(
        [(c * w.square()).sum() for c, w in zip(values, weights, strict=True)]
    ).sum()
    torch.testing.assert_close(kind.penalty().value(weights), total)
    vector = [torch.randn_like(w) for w in weights]
    slopes = torch.autograd.grad(total, weights, create_graph=True)
    inner = torch.stack([(s * v).sum() for s, v in zip(slopes, vector, strict=True)]).sum()
    truth = torch.autograd.grad(inner, list(kind.raw))
    mixed = kind.penalty().mixed(weights, vector)
    for mine, theirs in zip(mixed, truth, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("biass", "'biass' is no parameter of the model"),
        (["bias", "0.wieght"], "did you mean '0.weight'"),
        ("*", "leaves no parameter"),
        (lambda name, parameter: True, "leaves no parameter of the 6"),
    ],
)
def test_what_excludes_nothing_or_everything_is_refused(exclude: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeightDecay(Net(), exclude=exclude)


def test_a_decay_of_another_model_is_refused() -> None:
    problem = problem_of(lambda net: WeightDecay(nn.ModuleList([net[0], nn.Linear(2, 2).double()])))
    with pytest.raises(UsageError, match="not trained: make it from the model"):
        JointOptimizer(problem, MetaConfig(inner_steps=1)).step()
