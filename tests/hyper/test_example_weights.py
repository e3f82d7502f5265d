"""Example weights against their formula."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import ift_tune
from ift_tune.base.errors import UsageError
from ift_tune.hyper import ExampleWeights
from ift_tune.implicit.hypergradient import hypergradient
from ift_tune.implicit.inverse import Dense

LIKE = torch.empty(0, dtype=torch.float64)


def moved(transform: Literal["sigmoid", "softplus"] = "sigmoid") -> ExampleWeights:
    weights = ExampleWeights(5, transform=transform, like=LIKE)
    with torch.no_grad():
        weights.raw.copy_(torch.linspace(-2.0, 3.0, 5, dtype=torch.float64))
    return weights


@pytest.mark.parametrize("transform", ["sigmoid", "softplus"])
def test_losses_are_multiplied_by_the_weights_at_their_index(
    transform: Literal["sigmoid", "softplus"],
) -> None:
    weights, index = moved(transform), torch.tensor([4, 0, 4])
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    raw = weights.raw.detach()[index]
    factor = 1.0 / (1.0 + (-raw).exp()) if transform == "sigmoid" else raw.exp().log1p()
    torch.testing.assert_close(weights.weigh(losses, index).detach(), losses * factor)
    torch.testing.assert_close(weights(index), weights()[index])
    assert weights().shape == (5,)


def test_hypergradient_of_a_weighted_mean_is_the_closed_form() -> None:
    """w* = Σcᵢxᵢ/Σcᵢ, so ∂w*/∂λᵢ = c′(λᵢ)(xᵢ − w*)/Σcⱼ."""
    weights, values = moved(), torch.tensor([1.0, 4.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    factor = weights().detach()
    centre = (factor @ values / factor.sum()).requires_grad_()
    losses = (centre - values).square()
    result = hypergradient(
        weights.weigh(losses, torch.arange(5)).mean(),
        centre.pow(3),
        [centre],
        weights,
        inverse=Dense(),
    )
    mean: Tensor = centre.detach()
    slope = factor * (1.0 - factor) * (values - mean) / factor.sum()
    torch.testing.assert_close(result.grads[0], 3.0 * mean.square() * slope)


def test_examples_outside_the_batch_get_no_gradient() -> None:
    weights = moved()
    (gradient,) = torch.autograd.grad(
        weights.weigh(torch.ones(2, dtype=torch.float64), torch.tensor([1, 3])).sum(), weights.raw
    )
    assert gradient.nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("transform", "init"), [("sigmoid", 0.5), ("sigmoid", 0.99), ("softplus", 1.0)]
)
def test_init_is_the_weight_after_the_transform(
    transform: Literal["sigmoid", "softplus"], init: float
) -> None:
    weights = ExampleWeights(3, init=init, transform=transform, like=LIKE)
    torch.testing.assert_close(weights(), torch.full_like(weights(), init))
    assert weights.summary()["mean"] == pytest.approx(init)
    assert weights.count == 3
    assert ExampleWeights(3).raw.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"examples": 0}, "examples must be an integer of at least 1, got 0"),
        ({"examples": 2, "init": 1.0}, "a weight inside the range of the transform, got 1.0"),
        ({"examples": 2, "init": 0.0}, "got 0.0"),
        ({"examples": 2, "init": -0.5, "transform": "softplus"}, "got -0.5"),
        ({"examples": 2, "transform": "exp"}, "unknown transform 'exp'"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ExampleWeights(**arguments)


def test_batches_without_an_index_are_refused_with_the_mend() -> None:
    with pytest.raises(UsageError, match=r"yield \(inputs, targets, index\)"):
        moved().weigh(torch.ones(2), None)


@pytest.mark.parametrize(("optimizer", "alone"), [("sgd", True), ("adam", False)])
def test_whether_an_outer_step_moves_its_own_examples_alone(optimizer: str, alone: bool) -> None:
    """As docs/kinds.md says: Adam's moments move those that were met before."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(24, 4), torch.randint(3, (24,))
    train = ift_tune.Batches(inputs, targets, torch.arange(24), batch_size=6)
    kind = ExampleWeights(24)
    splits = ift_tune.Splits(train, *[ift_tune.Batches(inputs, targets)] * 3)
    problem = ift_tune.ClassificationProblem(torch.nn.Linear(4, 3), kind, splits)
    config = ift_tune.MetaConfig(inner_steps=1, meta_lr=0.1, meta_optimizer=optimizer)
    joint, moved = ift_tune.JointOptimizer(problem, config), []
    for _ in range(3):
        before = kind.raw.detach().clone()
        joint.step()
        moved.append(int((kind.raw.detach() != before).sum()))
    assert moved[0] <= 6
    assert (max(moved) <= 6) == alone
