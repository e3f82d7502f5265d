"""Unrolled differentiation against Neumann and against autograd by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.hypergradient import (
    UnrolledHypergradient,
    hypergradient,
    unrolled_hypergradient,
)
from ift_tune.implicit.inverse import Neumann
from ift_tune.implicit.vectors import flatten
from ift_tune.problem.losses import Functional
from ift_tune.testing import Quadratic
from ift_tune.testing.frozen import minimise


def unroll(problem: Quadratic, start: Tensor, steps: int, lr: float) -> UnrolledHypergradient:
    functional = Functional(problem)
    return unrolled_hypergradient(
        lambda w: functional.train_loss(w, None),
        lambda w: functional.val_loss(w, None, None),
        [start.clone().requires_grad_()],
        problem.hyper,
        steps=steps,
        lr=lr,
    )


def series(problem: Quadratic, terms: int, alpha: float) -> Tensor:
    with torch.no_grad():
        problem.weights()[0].copy_(problem.solution())
    return hypergradient(
        problem.train_loss(None),
        problem.val_loss(None),
        problem.model,
        problem.hyper,
        inverse=Neumann(terms=terms, alpha=alpha),
    ).grads[0]


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("lr", [0.1, 1.5])
def test_steps_from_the_optimum_equal_one_neumann_term_less(steps: int, lr: float) -> None:
    problem = Quadratic()
    found = unroll(problem, problem.solution(), steps, lr).grads[0]
    torch.testing.assert_close(found, series(problem, steps - 1, lr), rtol=1e-12, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    steps=st.integers(1, 12),
    lr=st.floats(0.01, 1.9),
    seed=st.integers(0, 1000),
    hypers=st.integers(1, 5),
)
def test_the_equality_is_a_law(steps: int, lr: float, seed: int, hypers: int) -> None:
    problem = Quadratic(weights=4, hypers=hypers, seed=seed)
    found = unroll(problem, problem.solution(), steps, lr).grads[0]
    torch.testing.assert_close(found, series(problem, steps - 1, lr), rtol=1e-10, atol=1e-10)


def _net_losses() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets, hyper = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((8, 2), (8, 1), (2,))
    )
    return inputs, targets, hyper.requires_grad_()


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_the_equality_holds_for_a_net_at_its_minimum(steps: int) -> None:
    inputs, targets, hyper = _net_losses()

    def train(weights: list[Tensor]) -> Tensor:
        first, second = weights
        decay = hyper[0].exp() * first.square().sum() + hyper[1].exp() * second.square().sum()
        return (torch.tanh(inputs @ first) @ second - targets).square().mean() + 0.1 * decay

    def val(weights: list[Tensor]) -> Tensor:
        first, second = weights
        return (torch.tanh((inputs + 0.3) @ first) @ second - targets).square().mean()

    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3), (3, 1))]
    weights = [w.requires_grad_() for w in minimise(train, start)[0]]
    unrolled = unrolled_hypergradient(train, val, weights, [hyper], steps=steps, lr=0.2)
    implicit = hypergradient(
        train(weights), val(weights), weights, [hyper], inverse=Neumann(terms=steps - 1, alpha=0.2)
    )
    error = float((unrolled.grads[0] - implicit.grads[0]).norm() / implicit.grads[0].norm())
    assert error < 1e-7


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_equals_backward_through_the_same_steps(steps: int) -> None:
    inputs, targets, hyper = _net_losses()
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(2, 1, generator=generator, dtype=torch.float64)

    def train(weight: Tensor) -> Tensor:
        residual = torch.tanh(inputs @ weight) - targets
        return residual.square().mean() + (hyper.exp()[:, None] * weight.square()).sum()

    def val(weight: Tensor) -> Tensor:
        return (inputs @ weight).sin().mean() + 0.1 * hyper.square().sum()

    iterate = start.clone().requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(train(iterate), iterate, create_graph=True)
        last_train = train(iterate)
        iterate = iterate - 0.1 * slope
    (truth,) = torch.autograd.grad(val(iterate), hyper)
    result = unrolled_hypergradient(
        lambda w: train(w[0]),
        lambda w: val(w[0]),
        [start.clone().requires_grad_()],
        [hyper],
        steps=steps,
        lr=0.1,
    )
    torch.testing.assert_close(result.grads[0], truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.weights[0], iterate.detach())
    torch.testing.assert_close(result.val_loss, val(iterate).detach())
    torch.testing.assert_close(result.train_loss, last_train.detach())
    assert (result.stats.hvps, result.stats.alpha) == (steps, 0.1)


def test_many_steps_approach_the_exact_hypergradient_and_few_do_not() -> None:
    problem = Quadratic()
    truth = problem.exact_hypergradient()
    few, many = (unroll(problem, torch.zeros_like(problem.goal), k, 1.0) for k in (3, 500))
    torch.testing.assert_close(many.grads[0], truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(many.weights[0], problem.solution(), rtol=1e-9, atol=1e-9)
    assert float((few.grads[0] - truth).norm() / truth.norm()) > 0.1
    assert few.status is SolveStatus.TRUNCATED


def test_nothing_is_written() -> None:
    problem = Quadratic()
    start, hyper = problem.weights()[0], problem.hypers()[0]
    before = start.detach().clone(), hyper.detach().clone()
    with torch.no_grad():  # the caller's mode does not matter
        result = unroll(problem, start.detach(), 3, 0.5)
        functional = Functional(problem)
        direct = unrolled_hypergradient(
            lambda w: functional.train_loss(w, None),
            lambda w: functional.val_loss(w, None, None),
            problem.model,
            problem.hyper,
            steps=3,
            lr=0.5,
        )
    assert torch.equal(direct.grads[0], result.grads[0])
    assert torch.equal(start, before[0])
    assert torch.equal(hyper, before[1])
    assert start.grad is None
    assert hyper.grad is None
    assert not any(t.requires_grad for t in [*result.grads, *result.weights, result.val_loss])


def test_weights_unused_in_the_training_loss_stay() -> None:
    problem = Quadratic()
    functional = Functional(problem)
    idle = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    result = unrolled_hypergradient(
        lambda w: functional.train_loss(w[:1], None),
        lambda w: functional.val_loss(w[:1], None, None) + w[1].sum(),
        [problem.weights()[0], idle],
        problem.hyper,
        steps=4,
        lr=0.5,
    )
    alone = unroll(problem, torch.zeros_like(problem.goal), 4, 0.5)
    assert torch.equal(flatten(result.grads), flatten(alone.grads))
    assert torch.equal(result.weights[1], idle.detach())


def test_divergence_ends_as_a_status() -> None:
    problem = Quadratic()
    result = unroll(problem, torch.ones_like(problem.goal), 500, 1e6)
    assert result.status is SolveStatus.NONFINITE
    assert not result.usable


@pytest.mark.parametrize(
    ("steps", "lr"), [(0, 0.1), (-1, 0.1), (2, 0.0), (2, -0.1), (2, float("nan"))]
)
def test_nonsense_is_refused(steps: int, lr: float) -> None:
    problem = Quadratic()
    with pytest.raises(UsageError, match=f"got steps={steps}, lr={lr}"):
        unroll(problem, problem.goal, steps, lr)
