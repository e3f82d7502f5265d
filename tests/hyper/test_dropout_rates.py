"""Dropout with learned rates against its formula, and inside recurrent layers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ift_tune.base.errors import UsageError
from ift_tune.base.views import HeatMap, Histogram
from ift_tune.hyper import Compose, DropoutRates, DropoutSite, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.double_backward import safe_kernels, vjp
from ift_tune.implicit.vectors import flatten, randn_like
from ift_tune.problem.problem import Splits
from ift_tune.tasks.building import CharLSTM
from ift_tune.testing import check_hypergradient

T = 0.3


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def spread(rates: DropoutRates) -> DropoutRates:
    """The kind with rates that all differ."""
    with torch.no_grad():
        for i, raw in enumerate([*rates.common, *rates.own]):
            raw.copy_(torch.linspace(-2.0, 1.0 + i, raw.numel()).view_as(raw))
    return rates


def formula(rate: Tensor, uniform: Tensor) -> Tensor:
    """(1 − z)/(1 − p), as the papers write it."""
    z = torch.sigmoid(
        ((rate / (1 - rate)).log() + uniform.log() - (1 - uniform).log()) / T,
    )
    return (1 - z) / (1 - rate)


def uniforms(*shapes: tuple[int, ...], seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.rand(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("per", ["site", "unit"])
def test_outputs_are_multiplied_by_the_formula(per: Any) -> None:
    net, x = make_net(), make_inputs(6, 3)
    rates = spread(DropoutRates(net, {"1": DropoutSite(per, units=4)}, temperature=T))
    (u,) = uniforms((6, 4))
    rate = rates.rates()["1"].detach()
    assert rate.shape == ((4,) if per == "unit" else ())
    torch.manual_seed(5)
    with rates.applied():
        found = net(x)
    torch.testing.assert_close(found, net[2](net[:2](x) * formula(rate, u)))


@pytest.mark.parametrize(
    ("site", "rates_shape", "noise_shape"),
    [
        (DropoutSite(), (), (4, 3)),
        (DropoutSite("row"), (4, 1), (4, 3)),
        (DropoutSite("weight"), (4, 3), (4, 3)),
        (DropoutSite(shared=True), (), (4, 1)),
        (DropoutSite("row", shared=True), (4, 1), (4, 1)),
    ],
)
def test_weights_are_multiplied_by_the_formula(
    site: DropoutSite, rates_shape: tuple[int, ...], noise_shape: tuple[int, ...]
) -> None:
    net, x = make_net(), make_inputs(6, 3)
    rates = spread(DropoutRates(net, {"0.weight": site}, temperature=T))
    (u,) = uniforms(noise_shape)
    rate = rates.rates()["0.weight"].detach()
    assert rate.shape == rates_shape
    torch.manual_seed(5)
    with rates.applied():
        found = net(x)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        masked.get_parameter("0.weight").mul_(formula(rate, u))
    torch.testing.assert_close(found, masked(x))


def test_a_low_temperature_drops_the_right_fraction_and_keeps_the_mean() -> None:
    net = make_net()
    rates = DropoutRates(net, {"1": DropoutSite()}, init=0.3, temperature=1e-3)
    torch.manual_seed(0)
    factors = rates.factors(rates.logits()[0], (100_000,)).detach()
    assert float((factors < 1e-6).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float((factors - 1 / 0.7).abs().lt(1e-6).double().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_mask_is_the_same_at_all_places(shared: bool) -> None:
    lstm = nn.LSTM(3, 4, batch_first=True).double()
    x = make_inputs(2, 5, 3)
    net = nn.ModuleDict({"lstm": lstm})
    rates = DropoutRates(net, {"lstm": DropoutSite("unit", shared=shared)}, temperature=T)
    plain, (h, c) = lstm(x)
    with rates.applied():
        dropped, states = lstm(x)
    assert torch.equal(states[0], h)  # only the outputs are dropped
    assert torch.equal(states[1], c)
    factors = (dropped / plain).detach()
    over_time = (factors - factors[:, :1]).abs().max()
    assert bool(over_time < 1e-9) == shared
    assert bool((factors[0, 0] != factors[1, 0]).all())  # examples have masks of their own


def state(net: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(parameter)) for name, parameter in net.named_parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was(fails: bool) -> None:
    net, x = make_net(), make_inputs(6, 3)
    sites = {"0.weight": DropoutSite("weight"), "1": DropoutSite(), "2.bias": DropoutSite("row")}
    rates = DropoutRates(net, sites)
    before, there, parameters = net(x), state(net), net[0].weight
    with contextlib.suppress(KeyError), rates.applied():
        assert net[0].weight is not parameters
        assert not torch.equal(net(x), before)
        if fails:
            raise KeyError
    assert state(net) == there
    assert torch.equal(net(x), before)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_failure_at_a_later_site_undoes_the_earlier_ones() -> None:
    net = make_net()
    rates = DropoutRates(net, {"0.weight": DropoutSite("weight"), "2.weight": DropoutSite("row")})
    there = state(net)
    rates.own[1].data = rates.own[1].data[:1].expand(3, 1)  # 3 rates for 2 rows
    with pytest.raises(RuntimeError), rates.applied():
        pass
    assert state(net) == there


def test_recurrent_weights_are_dropped_and_put_back() -> None:
    """nn.LSTM reads a list of its own, which must follow."""
    net = nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2, batch_first=True).double()})
    lstm, x = net["lstm"], make_inputs(2, 5, 3)
    names = ("weight_hh_l0", "weight_ih_l1")
    rates = spread(
        DropoutRates(net, {f"lstm.{n}": DropoutSite("weight") for n in names}, temperature=T)
    )
    before, there = lstm(x)[0], state(net)
    torch.manual_seed(5)
    with rates.applied():
        found = lstm(x)[0]
    masked: nn.Module = copy.deepcopy(net)["lstm"]  # a stale list of products could not be copied
    with torch.no_grad():
        for name, u in zip(names, uniforms((16, 4), (16, 4)), strict=True):
            masked.get_parameter(name).mul_(formula(rates.rates()[f"lstm.{name}"], u))
    torch.testing.assert_close(found, masked(x)[0])
    assert state(net) == there
    assert torch.equal(lstm(x)[0], before)


def test_masks_act_on_weights_that_stand_in() -> None:
    class Dropped(nn.Module):
        def __init__(self, model: nn.Module, rates: DropoutRates) -> None:
            super().__init__()
            self.model, self._rates = model, [rates]

        def forward(self, x: Tensor) -> Tensor:
            with self._rates[0].applied():
                return self.model(x)[0]  # type: ignore[no-any-return]

    lstm, x = nn.LSTM(3, 4, batch_first=True).double(), make_inputs(2, 5, 3)
    rates = DropoutRates(lstm, {"weight_hh_l0": DropoutSite("weight")}, temperature=T)
    weights = {
        name: w.detach().add(1.0).requires_grad_()
        for name, w in Dropped(lstm, rates).named_parameters()
    }
    torch.manual_seed(5)
    found = functional_call(Dropped(lstm, rates), weights, (x,))
    other = copy.deepcopy(lstm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
        other.get_parameter("weight_hh_l0").mul_(formula(torch.tensor(0.1), uniforms((16, 4))[0]))
    torch.testing.assert_close(found, other(x)[0])
    (gradient,) = torch.autograd.grad(found.sum(), weights["model.weight_hh_l0"])
    assert float(gradient.abs().sum()) > 0.0


def test_a_copy_follows_the_copied_model() -> None:
    net, x = make_net(), make_inputs(6, 3)
    sites = {"0.weight": DropoutSite("weight"), "1": DropoutSite()}
    rates = DropoutRates(net, sites)
    twin_net, twin = copy.deepcopy((net, rates))
    before = net(x), twin_net(x)
    with twin.applied():
        assert torch.equal(net(x), before[0])
        assert not torch.equal(twin_net(x), before[1])


def make_language(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, (4, 5), generator=generator)
    return text[:, :-1], text[:, 1:]


def test_hypergradient_through_an_lstm_is_right() -> None:
    torch.manual_seed(3)
    net = CharLSTM(characters=3, embedding=2, hidden=2).double()
    sites = {
        "embedding.weight": DropoutSite("row", shared=True),
        "embedding": DropoutSite(),
        "layer1.weight_hh_l0": DropoutSite("weight"),
        "layer1": DropoutSite("unit", shared=True),
        "layer2": DropoutSite(shared=True),
        "decoder.weight": DropoutSite(),
    }
    rates = spread(DropoutRates(net, sites, temperature=0.5))
    hyper = Compose({"dropout": rates, "decay": WeightDecay(net, "model", init=0.02)})
    val = [make_language(1)]
    splits = Splits([make_language(0)], val, val, val)
    report = check_hypergradient(
        ClassificationProblem(net, hyper, splits), directions=1, unrolled_steps=3
    )
    assert report.passed
    assert report.hypers == 6 + (3 + 16 + 2) + 1  # of each site, of its rates, and the decay
    assert report.stationarity < 1e-8


def test_curvature_of_an_lstm_in_single_precision_is_that_in_double() -> None:
    """The kernels of single precision on the CPU are others than those of double."""
    torch.manual_seed(3)
    net = CharLSTM(characters=5, embedding=4, hidden=8)
    inputs, targets = make_language(0)
    products = []
    for twin in (net, copy.deepcopy(net).double()):
        weights = list(twin.parameters())
        with safe_kernels(twin):
            loss = nn.functional.cross_entropy(twin(inputs), targets)
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        vector = [v.to(weights[0].dtype) for v in randn_like(list(net.parameters()), 0)]
        products.append(flatten(vjp(gradient, weights, vector)).double())
    torch.testing.assert_close(products[0], products[1], rtol=1e-3, atol=1e-5)
    assert float(products[1].norm()) > 0.1


def test_views_show_maps_of_matrices_and_all_rates() -> None:
    net = nn.Sequential(nn.Linear(200, 300), nn.Tanh())
    sites = {"0.weight": DropoutSite("weight"), "0.bias": DropoutSite("row"), "1": DropoutSite()}
    rates = spread(DropoutRates(net, sites))
    histogram, heat_map = rates.views()
    assert isinstance(histogram, Histogram)
    assert set(histogram.values) == set(sites)
    weight, bias = rates.rates()["0.weight"].detach(), rates.rates()["0.bias"].detach()
    torch.testing.assert_close(torch.as_tensor(histogram.values["0.bias"]), bias)
    thinned = torch.as_tensor(histogram.values["0.weight"])
    assert len(thinned) < 5000
    assert (thinned.min(), thinned.max()) == (weight.min(), weight.max())
    assert float(thinned.median()) == pytest.approx(float(weight.median()), abs=1e-3)
    assert isinstance(heat_map, HeatMap)
    assert heat_map.values.shape == (64, 64)
    assert float(heat_map.values.mean()) == pytest.approx(float(weight.mean()), abs=1e-2)


def test_summary_and_coarse_space_are_a_rate_for_each_site() -> None:
    net = make_net()
    rates = DropoutRates(net, {"0.weight": DropoutSite("weight"), "1": DropoutSite()}, init=0.2)
    assert rates.summary() == pytest.approx({"0.weight": 0.2, "1": 0.2})
    assert {
        name: parameter.start for name, parameter in rates.coarse_space().items()
    } == pytest.approx({"0.weight": 0.2, "1": 0.2})
    rates.set_coarse({"0.weight": 0.05, "1": 0.5})
    assert rates.summary() == pytest.approx({"0.weight": 0.05, "1": 0.5})
    assert rates.count == 2 + 12


def test_many_rates_are_a_common_number_and_their_own() -> None:
    net = make_net()
    rates = DropoutRates(net, {"0.weight": DropoutSite("weight")}, init=0.2)
    weights = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)
    rate = rates.rates()["0.weight"]
    by_common, by_own = torch.autograd.grad((weights * rate).sum(), [*rates.common, *rates.own])
    torch.testing.assert_close(by_own, weights * 0.2 * 0.8)
    torch.testing.assert_close(by_common, by_own.sum())
    filled = DropoutRates(
        net, {"0.weight": DropoutSite("weight"), "1": DropoutSite()}, init=nn.init.ones_
    )
    assert [float(raw.detach().mean()) for raw in (*filled.common, *filled.own)] == [0.0, 1.0, 1.0]


def test_summary_of_many_sites_is_short() -> None:
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(21)])
    rates = DropoutRates(net, {str(i): DropoutSite() for i in range(21)}, init=0.25)
    assert rates.summary() == pytest.approx(dict.fromkeys(("min", "median", "mean", "max"), 0.25))


@pytest.mark.parametrize(
    ("sites", "options", "text"),
    [
        ({}, {}, "must map names"),
        ({"1": "unit"}, {}, "must map names"),
        ({"0.wieght": DropoutSite()}, {}, "did you mean '0.weight'"),
        ({"": DropoutSite()}, {}, "no submodule or parameter ''"),
        ({"1": DropoutSite("unit")}, {}, "Tanh does not tell how many units"),
        ({"1": DropoutSite("weight")}, {}, "'site' or 'unit' here, got 'weight'"),
        ({"0.weight": DropoutSite("unit")}, {}, "'site' or 'row' or 'weight' here"),
        ({"0.weight": DropoutSite("weight", shared=True)}, {}, "'site' or 'row' here"),
        ({"1": DropoutSite()}, {"init": 0.0}, r"a rate in \(0, 1\), got 0.0"),
        ({"1": DropoutSite()}, {"init": 1.0}, r"a rate in \(0, 1\), got 1.0"),
        ({"1": DropoutSite()}, {"temperature": 0.0}, "temperature must be a finite number above 0"),
    ],
)
def test_nonsense_is_refused(sites: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        DropoutRates(make_net(), sites, **options)


def test_wrong_outputs_are_refused() -> None:
    net = make_net()
    rates = DropoutRates(net, {"1": DropoutSite("unit", units=5)})
    with pytest.raises(UsageError, match=r"last dimension is 5, got \(6, 4\)"), rates.applied():
        net(make_inputs(6, 3))
    with pytest.raises(UsageError, match="batch_first=True"):
        DropoutRates(nn.ModuleDict({"l": nn.LSTM(2, 2)}), {"l": DropoutSite(shared=True)})


@pytest.mark.parametrize(
    ("layer", "units"),
    [
        (nn.Linear(2, 3), 3),
        (nn.Embedding(2, 5), 5),
        (nn.LSTM(2, 4, bidirectional=True), 8),
        pytest.param(
            nn.LSTM(2, 4, proj_size=3),
            3,
            marks=pytest.mark.filterwarnings("ignore:LSTM with projections"),
        ),
    ],
)
def test_layers_tell_how_many_units_they_have(layer: nn.Module, units: int) -> None:
    rates = DropoutRates(nn.ModuleDict({"l": layer}), {"l": DropoutSite("unit")})
    assert rates.count == 1 + units
    assert rates.rates()["l"].shape == (units,)
    inputs = torch.zeros(3, 2, dtype=torch.long if isinstance(layer, nn.Embedding) else None)
    with rates.applied():
        layer(inputs)
