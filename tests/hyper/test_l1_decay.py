"""The smoothed L1 penalty, decays per channel, and what both look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.views import HeatMap, Histogram
from ift_tune.hyper import L1Decay, WeightDecay
from ift_tune.hyper.layout import Per
from ift_tune.hyper.pictures import heat_map, sample
from ift_tune.hyper.separable import Separable
from ift_tune.implicit.vectors import flatten, randn_like

PERS: list[Per] = ["model", "module", "tensor", "channel", "input", "weight"]


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


def make(
    kind: type[Separable], per: Per, transform: Any = "softplus", seed: int = 0, **more: Any
) -> tuple[Separable, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    net = make_net().double()
    found = kind(net, per, transform=transform, **more)
    weights: list[Tensor] = list(net.parameters())
    with torch.no_grad():
        for tensor in [*weights, *found.raw]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return found, weights


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("transform", ["softplus", "exp"])
@pytest.mark.parametrize(("kind", "more"), [(WeightDecay, {}), (L1Decay, {"epsilon": 0.3})])
@settings(derandomize=True, deadline=None, max_examples=3)
@given(seed=st.integers(0, 1000))
def test_closed_forms_equal_autograd(
    kind: type[Separable], more: dict[str, float], per: Per, transform: str, seed: int
) -> None:
    decay, weights = make(kind, per, transform, seed, **more)
    penalty, vector = decay.penalty(), randn_like(weights, seed)
    gradient = torch.autograd.grad(penalty.value(weights), weights, create_graph=True)
    truth = torch.autograd.grad(gradient, [*weights, *decay.raw], vector)
    found = [torch.zeros_like(w) for w in weights]
    penalty.add_gradient_(found, weights)
    close = torch.testing.assert_close
    close(flatten(found), flatten(gradient).detach())
    close(flatten(penalty.hvp(weights, vector)), flatten(truth[: len(weights)]))
    mixed = penalty.mixed(weights, vector)
    assert [m.shape for m in mixed] == [h.shape for h in penalty.hypers]
    close(flatten(mixed), flatten(truth[len(weights) :]))


def test_value_is_the_formula_also_next_to_zero() -> None:
    decay, weights = make(L1Decay, "weight", epsilon=0.2)
    with torch.no_grad():
        weights[0].view(-1)[:2] = torch.tensor([1e-9, 0.0])
    w, c = flatten(weights), flatten(decay.decays())
    torch.testing.assert_close(decay(), (c * ((w.square() + 0.04).sqrt() - 0.2)).sum())
    tiny = torch.tensor([1e-7], requires_grad=True)  # in float32, √(w² + ε²) − ε would be 0
    single = L1Decay(nn.ParameterList([tiny]), init=1.0, epsilon=0.2)
    assert float(single.penalty().value([tiny]).detach()) == pytest.approx(1e-14 / 0.4, rel=1e-4)


def test_a_small_epsilon_is_an_l1_penalty() -> None:
    decay, weights = make(L1Decay, "model", epsilon=1e-9)
    strength = float(decay.decays()[0].detach())
    truth = strength * flatten(weights).abs().sum()
    torch.testing.assert_close(decay(), truth, rtol=1e-7, atol=0.0)
    slope = [torch.zeros_like(w) for w in weights]
    decay.penalty().add_gradient_(slope, weights)
    torch.testing.assert_close(flatten(slope), strength * flatten(weights).sign())


def test_curvature_at_zero_is_the_decay_over_epsilon() -> None:
    decay, weights = make(L1Decay, "model", "exp", epsilon=1e-3)
    zeros, ones = [torch.zeros_like(w) for w in weights], [torch.ones_like(w) for w in weights]
    found = flatten(decay.penalty().hvp(zeros, ones))
    truth = float(decay.raw[0].detach().exp()) / 1e-3
    torch.testing.assert_close(found, torch.full_like(found, truth))


@pytest.mark.parametrize(
    ("per", "count"), [("model", 1), ("tensor", 6), ("channel", 16), ("weight", 41)]
)
def test_one_decay_for_each(per: Per, count: int) -> None:
    decay, weights = make(WeightDecay, per)
    assert decay.count == count
    full = [c.expand_as(w) for c, w in zip(decay.decays(), weights, strict=True)]
    assert len(full) == len(weights)


def test_weights_of_a_channel_share_a_decay() -> None:
    decay, weights = make(WeightDecay, "channel")
    assert [tuple(raw.shape) for raw in decay.raw] == [(3, 1, 1, 1), (3,), (3,), (3,), (2, 1), (2,)]
    penalty, before = decay.penalty(), decay().detach()
    with torch.no_grad():
        decay.raw[0][1] += 0.5  # the second filter's
    change = decay().detach() - before
    strength = torch.nn.functional.softplus(decay.raw[0].detach()[1])
    lower = torch.nn.functional.softplus(decay.raw[0].detach()[1] - 0.5)
    torch.testing.assert_close(
        change, ((strength - lower) * weights[0][1].square().sum()).reshape(()).detach()
    )
    fine, _ = make(WeightDecay, "weight")
    with torch.no_grad():
        for coarse, raw in zip(penalty.hypers, fine.raw, strict=True):
            raw.copy_(coarse.expand_as(raw))
    vector = randn_like(weights, 1)
    sums = [m.flatten(1).sum(1) if m.ndim > 1 else m for m in fine.penalty().mixed(weights, vector)]
    torch.testing.assert_close(flatten(penalty.mixed(weights, vector)), flatten(sums))


@pytest.mark.parametrize("kind", [WeightDecay, L1Decay])
@pytest.mark.parametrize("per", PERS)
def test_the_coarse_space_sets_every_decay(kind: type[Separable], per: Per) -> None:
    decay, _ = make(kind, per)
    space = decay.coarse_space()
    assert len(space) == {"model": 1, "module": 4}.get(per, 7)
    decay.set_coarse(dict.fromkeys(space, 3.0) | {"decay": 0.01})
    found = flatten([c.flatten() for c in decay.decays()])
    torch.testing.assert_close(found, torch.full_like(found, 0.01 if per == "model" else 0.03))


def test_views_are_a_histogram_by_layer_and_maps_of_matrices() -> None:
    decay, _ = make(WeightDecay, "weight")
    histogram, filters, matrix = decay.views()
    assert isinstance(histogram, Histogram)
    assert {name: v.size for name, v in histogram.values.items()} == {
        "0.weight": 24,
        "3.weight": 6,
    }
    assert isinstance(filters, HeatMap)
    assert isinstance(matrix, HeatMap)
    values = decay.decays()
    for view, expected in ((filters, values[0].mean(dim=(2, 3))), (matrix, values[4])):
        torch.testing.assert_close(torch.as_tensor(view.values), expected.detach())


def test_views_of_coarser_decays_are_histograms() -> None:
    assert make(WeightDecay, "model")[0].views() == []
    (tensors,) = make(L1Decay, "tensor")[0].views()
    assert isinstance(tensors, Histogram)
    assert tensors.values["all"].size == 6
    (channels,) = make(L1Decay, "channel")[0].views()
    assert isinstance(channels, Histogram)
    assert {name: v.size for name, v in channels.values.items()} == {
        "0.weight": 3,
        "3.weight": 2,
    }


def test_views_of_a_large_model_are_small() -> None:
    net = nn.Sequential(*(nn.Linear(130, 130) for _ in range(20)))
    histogram, *maps = WeightDecay(net).views()
    assert isinstance(histogram, Histogram)
    assert next(iter(histogram.values)) == "0.weight"
    assert list(histogram.values)[-1] == "19.weight"
    assert len(maps) == len(histogram.values) == 8
    assert all(v.size == 1024 for v in histogram.values.values())
    assert all(isinstance(m, HeatMap) and m.values.shape == (64, 64) for m in maps)


def test_a_sample_has_the_extremes_and_quantiles_of_all() -> None:
    values = torch.randperm(100_001, generator=torch.Generator().manual_seed(0)).double()
    found = sample(values)
    assert (float(found[0]), float(found[-1])) == (0.0, 100_000.0)
    assert float(found.median()) == pytest.approx(50_000.0, rel=1e-3)
    assert float(found.std()) == pytest.approx(float(values.std()), rel=3e-3)


def test_the_map_of_a_large_matrix_keeps_its_mean_and_says_its_size() -> None:
    values = torch.rand(128, 192, 3, 3, dtype=torch.float64)
    view = heat_map("a large matrix", values, "row", "column")
    found = torch.from_numpy(view.values)
    assert view.shape == tuple(values.shape[:2])
    assert found.shape == (64, 64)
    torch.testing.assert_close(found[0, 0], values[:2, :3].mean())
    torch.testing.assert_close(found.mean(), values.mean())


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_no_width_is_refused(epsilon: float) -> None:
    with pytest.raises(
        UsageError, match=r"epsilon must be a (width above|finite number of at least) 0"
    ):
        L1Decay(nn.Linear(1, 1), epsilon=epsilon)
