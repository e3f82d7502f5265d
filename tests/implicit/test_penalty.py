"""Sums of penalties against autograd through the sum of their values."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ift_tune.hyper import WeightDecay
from ift_tune.implicit.hypergradient import hypergradient
from ift_tune.implicit.inverse import Dense
from ift_tune.implicit.penalty import Penalty, SumPenalty
from ift_tune.implicit.vectors import flatten, randn_like, zeros_like


class Quartic(Penalty):
    """r = exp(λ)·Σ w⁴, not quadratic, so that its curvature depends on the weights."""

    def __init__(self, scale: Tensor) -> None:
        self.hypers = [scale]

    def value(self, weights: Sequence[Tensor]) -> Tensor:
        return self.hypers[0].exp() * flatten(weights).pow(4).sum()

    @torch.no_grad()
    def add_gradient_(self, gradient: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        for slope, weight in zip(gradient, weights, strict=True):
            slope.add_(4.0 * self.hypers[0].exp() * weight.pow(3))

    @torch.no_grad()
    def hvp(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        scale = 12.0 * self.hypers[0].exp()
        return [scale * w.square() * v for w, v in zip(weights, vector, strict=True)]

    @torch.no_grad()
    def mixed(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        return [4.0 * self.hypers[0].exp() * (flatten(weights).pow(3) @ flatten(vector))]


def make(parts: str) -> tuple[Penalty, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    scale = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))
    pieces: dict[str, Penalty] = {
        "d": WeightDecay(net, "weight", init=0.2).penalty(),
        "t": WeightDecay(net, "tensor", init=0.4).penalty(),
        "q": Quartic(scale),
    }
    return SumPenalty([pieces[p] for p in parts]), list(net.parameters())


@pytest.mark.parametrize("parts", ["q", "dq", "qd", "dtq", "qq"])
def test_derivatives_of_a_sum_are_those_of_its_value(parts: str) -> None:
    penalty, weights = make(parts)
    vector = randn_like(weights, 1)
    gradient = torch.autograd.grad(penalty.value(weights), weights, create_graph=True)
    truth = torch.autograd.grad(gradient, [*weights, *penalty.hypers], vector)
    found = randn_like(weights, 2)
    start = flatten(found).clone()
    penalty.add_gradient_(found, weights)
    close = torch.testing.assert_close
    close(flatten(found) - start, flatten(gradient).detach())
    close(flatten(penalty.hvp(weights, vector)), flatten(truth[:2]))
    mixed = penalty.mixed(weights, vector)
    assert [m.shape for m in mixed] == [h.shape for h in penalty.hypers]
    if parts != "qq":
        close(flatten(mixed), flatten(truth[2:]))
    else:  # autograd gives each occurrence of a shared λ the whole, a sum gives it its share
        close(flatten(mixed).sum(), truth[2])


def test_value_of_a_sum_is_the_sum_of_values() -> None:
    penalty, weights = make("dtq")
    assert isinstance(penalty, SumPenalty)
    assert len(penalty.hypers) == 2 + 2 + 1
    values = [float(part.value(weights).detach()) for part in penalty.parts]
    assert float(penalty.value(weights).detach()) == pytest.approx(sum(values), rel=1e-14)


@pytest.mark.parametrize("parts", ["q", "dtq", "qq"])
def test_hypergradient_is_that_of_the_penalty_in_the_loss(parts: str) -> None:
    penalty, weights = make(parts)
    goal = randn_like(weights, 3)
    loss = torch.stack([(w - g).square().sum() for w, g in zip(weights, goal, strict=True)]).sum()
    val = flatten(weights).sin().sum()
    hypers = list(dict.fromkeys(penalty.hypers))
    closed = hypergradient(loss, val, weights, hypers, inverse=Dense(), penalty=penalty)
    through = hypergradient(loss + penalty.value(weights), val, weights, hypers, inverse=Dense())
    torch.testing.assert_close(flatten(closed.grads), flatten(through.grads))


def test_methods_of_a_sum_change_no_weight() -> None:
    penalty, weights = make("dq")
    before = flatten(weights).detach().clone()
    penalty.add_gradient_(zeros_like(weights), weights)
    penalty.hvp(weights, randn_like(weights, 0))
    penalty.mixed(weights, randn_like(weights, 0))
    assert torch.equal(flatten(weights), before)
    assert all(t.grad is None for t in [*weights, *penalty.hypers])
