"""Mixed losses against their formulas, and their derivatives against finite differences."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.hyper import LossMixture
from ift_tune.hyper.loss_mixture import TERMS

LOSS = partial(F.cross_entropy, reduction="none")
NAMES = ("cross_entropy", *TERMS)


def make(places: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 3, *places, generator=generator, dtype=torch.float64)
    return logits, torch.randint(3, (5, *places), generator=generator)


def alone(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    """A loss by itself, with coefficient 1."""
    kind = LossMixture((name,), like=logits)
    return kind.criterion(LOSS)(logits, targets)


def test_each_loss_is_its_formula_written_out() -> None:
    logits, targets = make()
    for i, k in enumerate(targets.tolist()):
        exps = [math.exp(z) for z in logits[i].tolist()]
        pi = [e / sum(exps) for e in exps]
        truth = {
            "cross_entropy": -math.log(pi[k]),
            "brier": sum((p - (j == k)) ** 2 for j, p in enumerate(pi)),
            "focal": -((1.0 - pi[k]) ** 2) * math.log(pi[k]),
            "absolute": 1.0 - pi[k],
            "confidence": math.log(3) + sum(p * math.log(p) for p in pi),
        }
        assert set(truth) == set(NAMES)
        for name, value in truth.items():
            assert float(alone(name, logits, targets)[i].detach()) == pytest.approx(
                value, rel=1e-12
            )


@pytest.mark.parametrize("places", [(), (4,), (2, 2)])
def test_the_mixture_is_the_weighted_sum(places: tuple[int, ...]) -> None:
    logits, targets = make(places)
    start = {name: 0.3 + 0.2 * i for i, name in enumerate(NAMES)}
    kind = LossMixture(NAMES, init=start, like=logits)
    truth = sum(c * alone(name, logits, targets) for name, c in start.items())
    torch.testing.assert_close(kind.criterion(LOSS)(logits, targets), truth)
    assert kind.summary() == pytest.approx(start)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("places", [(), (4,)])
def test_class_numbers_are_probabilities_of_one(name: str, places: tuple[int, ...]) -> None:
    logits, targets = make(places)
    known = F.one_hot(targets, 3).movedim(-1, 1).double()
    torch.testing.assert_close(alone(name, logits, targets), alone(name, logits, known))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_twice_differentiable(name: str) -> None:
    logits, targets = make()
    soft = torch.softmax(make(seed=1)[0], dim=1)
    logits.requires_grad_()
    for chosen in (targets, soft):
        assert torch.autograd.gradgradcheck(lambda z, t=chosen: alone(name, z, t), (logits,))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_where_the_model_is_sure(name: str) -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0]] * 2, requires_grad=True)
    loss = alone(name, logits, torch.tensor([0, 1]))
    (slope,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    assert bool(torch.isfinite(slope).all())
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.square().sum(), logits)
        assert bool(torch.isfinite(bend).all())


def test_the_wrapped_loss_takes_the_place_of_the_cross_entropy() -> None:
    logits, targets = make()
    kind = LossMixture(("absolute", "cross_entropy"), init=1.0, like=logits)
    found = kind.criterion(lambda z, t: 7.0 * LOSS(z, t))(logits, targets)
    torch.testing.assert_close(
        found, alone("absolute", logits, targets) + 7.0 * LOSS(logits, targets)
    )


def test_the_coarse_space_are_the_coefficients() -> None:
    kind = LossMixture(("cross_entropy", "focal"), init=0.5).double()
    assert {n: k.start for n, k in kind.coarse_space().items()} == pytest.approx(kind.summary())
    kind.set_coarse({"focal": 2.0, "cross_entropy": 0.25})
    assert kind.summary() == pytest.approx({"cross_entropy": 0.25, "focal": 2.0})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"losses": ("cross_entropy", "focl")}, "no loss 'focl'.*did you mean 'focal'"),
        ({"losses": ()}, "different names"),
        ({"losses": ("brier", "brier")}, "different names"),
        ({"init": 0.0}, "init must be a coefficient above 0, got 0.0"),
        ({"init": {"brier": 1.0}}, "a value for each of"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        LossMixture(**arguments)
