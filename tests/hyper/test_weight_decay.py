"""Weight decay against its formula and against autograd."""

from __future__ import annotations

import functools
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.hyper import WeightDecay
from ift_tune.implicit.vectors import flatten, randn_like

Per = Literal["model", "tensor", "weight"]
Name = Literal["softplus", "exp"]
PERS: list[Per] = ["model", "tensor", "weight"]
NAMES: list[Name] = ["softplus", "exp"]


def make(per: Per, transform: Name, seed: int = 0) -> tuple[WeightDecay, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    decay = WeightDecay(net, per, transform=transform)
    weights: list[Tensor] = list(net.parameters())
    with torch.no_grad():
        for tensor in [*weights, *decay.raw]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return decay, weights


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("transform", NAMES)
@settings(derandomize=True, deadline=None, max_examples=5)
@given(seed=st.integers(0, 1000))
def test_closed_forms_equal_autograd(per: Per, transform: Name, seed: int) -> None:
    decay, weights = make(per, transform, seed)
    penalty, vector = decay.penalty(), randn_like(weights, seed)
    gradient = torch.autograd.grad(penalty.value(weights), weights, create_graph=True)
    truth = torch.autograd.grad(gradient, [*weights, *decay.raw], vector, retain_graph=True)
    found = [torch.zeros_like(w) for w in weights]
    penalty.add_gradient_(found, weights)
    close = torch.testing.assert_close
    close(flatten(found), flatten(gradient).detach())
    close(flatten(penalty.hvp(weights, vector)), flatten(truth[: len(weights)]))
    mixed = penalty.mixed(weights, vector)
    assert [m.shape for m in mixed] == [h.shape for h in penalty.hypers]
    close(flatten(mixed), flatten(truth[len(weights) :]))
    assert not any(t.requires_grad for t in [*found, *mixed])


@pytest.mark.parametrize("transform", NAMES)
def test_value_is_the_formula(transform: Name) -> None:
    decay, weights = make("weight", transform)
    raw, flat = flatten(list(decay.raw)), flatten(weights)
    positive = raw.exp() if transform == "exp" else raw.exp().log1p()
    torch.testing.assert_close(decay(), (positive * flat.square()).sum())
    torch.testing.assert_close(flatten(decay.decays()), positive)


def test_gradient_is_that_of_the_optimiser_with_twice_the_decay() -> None:
    decay, weights = make("model", "exp")
    strength = float(decay.raw[0].detach().exp())
    before = flatten(weights).detach().clone()
    slope = [torch.zeros_like(w) for w in weights]
    decay.penalty().add_gradient_(slope, weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    torch.optim.SGD(weights, lr=0.1, weight_decay=2.0 * strength).step()
    torch.testing.assert_close(flatten(weights).detach(), before - 0.1 * flatten(slope))


@pytest.mark.parametrize(("per", "count"), [("model", 1), ("tensor", 4), ("weight", 11)])
def test_one_decay_for_each(per: Per, count: int) -> None:
    decay, weights = make(per, "softplus")
    assert decay.count == count
    assert len(decay.decays()) == len(weights)
    if per == "weight":
        assert [d.shape for d in decay.decays()] == [w.shape for w in weights]


def test_coarse_decays_are_sums_of_fine_ones() -> None:
    fine, weights = make("weight", "softplus")
    vector, sums = randn_like(weights, 1), {}
    for per in PERS:
        decay, _ = make(per, "softplus")
        with torch.no_grad():
            for raw in decay.raw:
                raw.fill_(0.3)
        sums[per] = decay.penalty().mixed(weights, vector)
    assert fine.count == 11
    torch.testing.assert_close(
        flatten(sums["tensor"]), torch.stack([m.sum() for m in sums["weight"]])
    )
    torch.testing.assert_close(sums["model"][0], flatten(sums["tensor"]).sum())


def test_penalty_is_fixed_at_the_present_decay_and_reads_any_weights() -> None:
    decay, weights = make("weight", "exp")
    other = [w.detach() + 1.0 for w in weights]
    direct = (flatten(list(decay.raw)).exp() * flatten(other).square()).sum()
    torch.testing.assert_close(decay.penalty().value(other), direct)
    assert not torch.allclose(decay.penalty().value(other), decay())


@pytest.mark.parametrize("transform", NAMES)
@pytest.mark.parametrize("init", [1e-8, 1e-3, 1.0, 50.0, 1000.0])
def test_init_is_the_decay_after_the_transform(transform: Name, init: float) -> None:
    decay = WeightDecay(nn.Linear(2, 2).double(), init=init, transform=transform)
    found = flatten(decay.decays())
    torch.testing.assert_close(found, torch.full_like(found, init), rtol=1e-9, atol=0.0)
    assert decay.summary() == pytest.approx(
        {"min": init, "median": init, "mean": init, "max": init}, rel=1e-9
    )


def test_init_may_fill_the_raw_parameters() -> None:
    fill = functools.partial(nn.init.constant_, val=0.25)
    decay = WeightDecay(nn.Linear(2, 2), init=fill)
    assert all(bool((raw == 0.25).all()) for raw in decay.raw)


def test_frozen_weights_are_not_decayed() -> None:
    net = nn.Linear(3, 2).double()
    net.bias.requires_grad_(False)
    decay = WeightDecay(net)
    assert decay.count == 6
    torch.testing.assert_close(decay(), 1e-3 * net.weight.square().sum())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"per": "layer"}, "per must be one of model, module, tensor, .*weight, got 'layer'"),
        ({"init": 0.0}, "init must be a decay above 0, got 0.0"),
        ({"init": -1.0}, "init must be a decay above 0, got -1.0"),
        ({"transform": "softpuls"}, "did you mean 'softplus'"),
        ({"transform": "sigmoid"}, "unknown transform 'sigmoid'"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        WeightDecay(nn.Linear(1, 1), **arguments)
    with pytest.raises(UsageError, match="the model is empty"):
        WeightDecay(nn.ReLU())


def test_a_layer_frozen_afterwards_is_named_as_the_mistake() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    decay = WeightDecay(model)
    model[0].requires_grad_(False)
    with pytest.raises(UsageError, match="after freezing"):
        decay.penalty()
