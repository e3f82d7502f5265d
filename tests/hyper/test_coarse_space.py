"""The few numbers by which a search without gradients sets a whole kind of hyperparameters."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from ift_tune.hyper import CoarseParameter, Compose, ExampleWeights, WeightDecay

PER: tuple[Literal["model", "tensor", "weight"], ...] = ("model", "tensor", "weight")
TRANSFORMS: tuple[Literal["softplus", "exp"], ...] = ("softplus", "exp")
DTYPES = (torch.float32, torch.float64)


def network(dtype: torch.dtype = torch.float64, layers: int = 2) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("decay", [1e-6, 3e-4, 0.1, 1.0])
def test_decays_are_set_to_what_was_asked(
    per: Literal["model", "tensor", "weight"],
    transform: Literal["softplus", "exp"],
    dtype: torch.dtype,
    decay: float,
) -> None:
    model = network(dtype)
    kind = WeightDecay(model, per, transform=transform)
    factors = {"0.weight": 0.1, "0.bias": 2.0, "1.weight": 10.0, "1.bias": 1.0}
    space = {"decay": decay} | {f"factor.{name}": f for name, f in factors.items()}
    kind.set_coarse({name: space[name] for name in kind.coarse_space()})
    # A float32 λ of about −16 has itself an error of 1e-6, and so has exp(λ).
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for (name, _), found in zip(model.named_parameters(), kind.decays(), strict=True):
        wanted = decay if per == "model" else decay * factors[name]
        torch.testing.assert_close(
            found.detach(), torch.full_like(found, wanted), rtol=tolerance, atol=0.0
        )
    assert all(p.requires_grad and p.grad is None for p in kind.parameters())
    assert all(p.dtype is dtype for p in kind.parameters())


@pytest.mark.parametrize("per", PER)
def test_without_factors_all_have_the_one_decay(
    per: Literal["model", "tensor", "weight"],
) -> None:
    kind = WeightDecay(network(), per)
    kind.set_coarse({"decay": 0.03})
    summary = kind.summary()
    assert summary["min"] == pytest.approx(0.03)
    assert summary["max"] == pytest.approx(0.03)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("per", PER)
def test_the_start_is_how_the_kind_is_initialised(
    per: Literal["model", "tensor", "weight"], transform: Literal["softplus", "exp"]
) -> None:
    kind = WeightDecay(network(), per, init=2e-3, transform=transform)
    before = [d.detach().clone() for d in kind.decays()]
    kind.set_coarse({name: parameter.start for name, parameter in kind.coarse_space().items()})
    for one, other in zip(before, kind.decays(), strict=True):
        torch.testing.assert_close(one, other.detach())


@pytest.mark.parametrize("init", [1e-12, 1e-6, 0.5, 1.0, 50.0])
@pytest.mark.parametrize("per", PER)
def test_starts_lie_within_their_ranges(
    init: float, per: Literal["model", "tensor", "weight"]
) -> None:
    for parameter in WeightDecay(network(), per, init=init).coarse_space().values():
        assert 0.0 < parameter.low < parameter.high
        assert parameter.low <= parameter.start <= parameter.high


def test_decays_that_vanish_start_at_the_least() -> None:
    space = WeightDecay(network(), init=lambda raw: raw.fill_(-1e4)).coarse_space()
    assert space["decay"].start == space["decay"].low


@pytest.mark.parametrize(("layers", "factors"), [(1, 2), (6, 12), (7, 0)])
@pytest.mark.parametrize("per", PER)
def test_more_than_twelve_tensors_have_the_one_decay_alone(
    layers: int, factors: int, per: Literal["model", "tensor", "weight"]
) -> None:
    space = WeightDecay(network(layers=layers), per).coarse_space()
    assert len(space) == 1 + (0 if per == "model" else factors)
    assert [name for name, parameter in space.items() if not parameter.secondary] == ["decay"]


def test_frozen_tensors_have_no_factor() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    assert "factor.0.bias" not in WeightDecay(model).coarse_space()
    assert "factor.0.weight" in WeightDecay(model).coarse_space()


def test_a_composition_sets_each_kind_by_its_name() -> None:
    model = network()
    first, second = WeightDecay(model, "tensor"), WeightDecay(model, "model")
    kind = Compose({"a": first, "b": second, "examples": ExampleWeights(5)})
    assert set(kind.coarse_space()) == {f"a.{k}" for k in first.coarse_space()} | {"b.decay"}
    weights = kind["examples"].summary()
    values = {name: parameter.start for name, parameter in kind.coarse_space().items()}
    kind.set_coarse(values | {"a.decay": 0.2, "a.factor.1.bias": 5.0, "b.decay": 0.4})
    decays = [float(d.detach()) for d in first.decays()]
    assert decays == pytest.approx([0.2, 0.2, 0.2, 1.0], rel=1e-5)
    assert float(second.decays()[0].detach()) == pytest.approx(0.4)
    assert kind["examples"].summary() == weights


def test_a_kind_without_a_coarse_space_is_left_alone() -> None:
    kind = ExampleWeights(4)
    before = kind().detach().clone()
    kind.set_coarse({})
    assert kind.coarse_space() == {}
    assert torch.equal(kind().detach(), before)


@pytest.mark.parametrize(("value", "start"), [(0.5, 0.5), (1e-9, 1e-3), (99.0, 10.0)])
def test_a_parameter_starts_at_the_value_or_at_the_next_end(value: float, start: float) -> None:
    assert CoarseParameter.near(1e-3, 10.0, value) == CoarseParameter(1e-3, 10.0, start)
