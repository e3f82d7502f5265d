"""Scales of adapters: where they act, what they are worth at the end, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import ift_tune
from ift_tune import AdapterScale, ClassificationProblem, Compose, Splits, UsageError, WeightDecay
from ift_tune.testing import check_hypergradient
from ift_tune.testing.contracts import check_kind


class LoRA(nn.Module):
    """A linear layer of LoRA with modules."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, alpha: float = 3.0) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs)
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.scaling * self.lora_B(self.lora_A(x))
        return found


class TensorLoRA(nn.Module):
    """The form of loralib, with tensors, and merged in evaluation mode if so asked."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, *, merge: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs))
        self.lora_B = nn.Parameter(torch.randn(outputs, rank))
        self.scaling, self.merge, self.merged = 0.5, merge, False

    def train(self, mode: bool = True) -> TensorLoRA:
        super().train(mode)
        self.merged = self.merge and not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class NamedLoRA(nn.Module):
    """The form of peft, adapters by name."""

    def __init__(self, inputs: int, outputs: int, *names: str) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({n: nn.Linear(inputs, 3, bias=False) for n in names})
        self.lora_B = nn.ModuleDict({n: nn.Linear(3, outputs, bias=False) for n in names})
        self.scaling: dict[str, Any] = dict.fromkeys(names, 2.0)
        self.use_rslora = dict.fromkeys(names, True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x)
        for name, scaling in self.scaling.items():
            found = found + self.lora_B[name](self.lora_A[name](x)) * scaling
        return found


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        LoRA(4, 5), nn.Tanh(), TensorLoRA(5, 5), nn.Tanh(), NamedLoRA(5, 3, "only")
    ).double()


def rows(seed: int, examples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(examples) % 3


def with_scales(kind: AdapterScale, *scales: float) -> AdapterScale:
    with torch.no_grad():
        values = torch.tensor(scales, dtype=torch.float64)
        kind.raw.copy_(kind.transform.inverse(values))
    return kind


@torch.no_grad()
def by_hand(net: Any, x: Tensor, scales: tuple[float, float, float]) -> Tensor:
    first, second, third = (copy.deepcopy(net[i]) for i in (0, 2, 4))
    first.lora_B.weight *= scales[0]
    first.lora_B.bias *= scales[0]
    second.lora_B *= scales[1]
    third.lora_B["only"].weight *= scales[2]
    for layer in (first, second, third):
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    found: Tensor = third(second(first(x).tanh()).tanh())
    return found


@pytest.mark.parametrize("transform", ["softplus", "exp"])
def test_contributions_are_scaled_wherever_the_model_is_called(transform: Any) -> None:
    net, (x, _) = make_net(), rows(0)
    plain = net(x)
    kind = AdapterScale(net, transform=transform)
    assert kind.names == ("0", "2", "4")
    torch.testing.assert_close(net(x), plain)
    with_scales(kind, 0.5, 2.0, 0.01)
    wanted = by_hand(net, x, (0.5, 2.0, 0.01))
    for call in (net.train(), net.eval(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(call(x), wanted)
    layers: list[Any] = list(kind.layers().values())
    assert [layer.scaling for layer in layers] == [1.5, 0.5, {"only": 2.0}]


def test_the_hypergradient_has_its_direct_term() -> None:
    net = make_net()
    kind = with_scales(AdapterScale(net), 0.6, 1.4, 0.9)
    hyper = Compose({"scale": kind, "decay": WeightDecay(net, "model", init=0.05)})
    train, val = [rows(0)], [rows(5)]
    problem = ClassificationProblem(net, hyper, Splits(train, val, val, val))
    report = check_hypergradient(problem, directions=2, unrolled_steps=3)
    assert report.stationarity < 1e-8
    found = ift_tune.hypergradient(
        *(problem.train_loss(train[0]), problem.val_loss(val[0]), net, hyper),
        inverse=ift_tune.Dense(damping=1e12),  # of the implicit term nothing is left
        penalty=problem.penalty(),
    )
    direct = torch.autograd.grad(problem.val_loss(val[0]), kind.raw)[0]
    assert float(direct.abs().min()) > 1e-6
    torch.testing.assert_close(found.grads[0], direct, rtol=1e-6, atol=1e-9)


def test_forms_of_adapters_keep_the_laws_of_kinds() -> None:
    net, batch = make_net(), rows(3)
    check_kind(AdapterScale(net, transform="exp"), model=net, batch=batch)
    branch = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    check_kind(lambda model, inputs: AdapterScale(model, "4", init=1.5))
    check_kind(AdapterScale(branch, ["0", "2"]), model=branch, batch=batch)


def test_a_stand_in_for_the_scales_acts() -> None:
    net, (x, _) = make_net(), rows(0)
    kind = AdapterScale(net)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.kind = net, kind

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = net(x)
            return found

    raw = kind.transform.inverse(torch.tensor([0.5, 2.0, 0.01], dtype=torch.float64))
    found = functional_call(Both(), {"kind.raw": raw}, (x,))
    torch.testing.assert_close(found, by_hand(net, x, (0.5, 2.0, 0.01)))


def test_an_interrupted_call_does_not_scale_twice() -> None:
    net, (x, _) = make_net(), rows(0)
    kind = with_scales(AdapterScale(net), 0.5, 2.0, 0.01)
    wanted = net(x)
    layer: Any = net[4]
    base = layer.base

    class Broken(nn.Module):
        def __init__(self, error: BaseException) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: Tensor) -> Tensor:
            raise self.error

    for error in (RuntimeError(), KeyboardInterrupt()):
        layer.base = Broken(error)
        with pytest.raises(type(error)):
            net(x)
        layer.base = base
        torch.testing.assert_close(net(x), wanted)
        assert layer.scaling == {"only": 2.0}
    assert kind.count == 3


def test_a_later_kind_takes_the_place_of_an_earlier_one() -> None:
    net, (x, y) = make_net(), rows(0)
    first = with_scales(AdapterScale(net), 0.5, 2.0, 0.01)
    second = with_scales(AdapterScale(net, ["0", "4"]), 3.0, 1.0)
    torch.testing.assert_close(net(x), by_hand(net, x, (3.0, 2.0, 1.0)))
    with second.applied(), pytest.raises(UsageError, match=r"must be in the model.*none in 0, 4"):
        first.applied()
    both = Compose({"one": first, "two": second})
    problem = ClassificationProblem(net, both, Splits(*[[(x, y)]] * 4))
    with pytest.raises(UsageError, match="a later AdapterScale"):
        problem.train_loss((x, y))


def test_folding_leaves_the_function_and_no_trace() -> None:
    net, (x, _) = make_net(), rows(0)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    kind = with_scales(AdapterScale(net), 0.5, 2.0, 0.01)
    wanted = net(x)
    kind.fold()
    torch.testing.assert_close(net(x), wanted)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    with pytest.raises(UsageError, match="they leave it by fold"):
        kind.fold()
    torch.testing.assert_close(net(x), wanted)


def test_what_cannot_be_folded_is_left_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, _ = rows(0)
    kind = with_scales(AdapterScale(net, ["0", "1"]), 0.5, 2.0)
    wanted = net(x)
    with pytest.raises(UsageError, match=r"1 must end in a plain linear layer.*got a Tanh"):
        kind.fold()
    torch.testing.assert_close(net(x), wanted)
    folded = AdapterScale(net, "2")
    folded.fold(x)
    tied = nn.Sequential(TensorLoRA(4, 4), TensorLoRA(4, 4)).double()
    tied[1].lora_B = tied[0].lora_B
    with pytest.raises(UsageError, match="weights of its own"):
        AdapterScale(tied).fold()


def test_the_pattern_is_what_the_scales_say() -> None:
    net = make_net()
    kind = with_scales(AdapterScale(net), 0.5, 2.0, 0.01)
    found = kind.pattern(rank=8, threshold=0.1)
    assert found["target_modules"] == ["0", "2"]
    assert found["rank_pattern"] == {"0": 2, "2": 8}
    # Of rank r and alpha a layer multiplies by alpha/r: as now, 3/2 and 1/2, with the scales.
    assert found["alpha_pattern"] == pytest.approx({"0": 1.5 * 0.5 * 2, "2": 0.5 * 2.0 * 8})
    assert (found["r"], found["lora_alpha"]) == (8, pytest.approx(8.0))
    whole = kind.pattern(rank=4)
    assert whole["rank_pattern"] == {"0": 1, "2": 4, "4": 1}
    assert whole["alpha_pattern"]["4"] == pytest.approx(2.0 * 0.01)  # over the root of the rank
    with_scales(kind, 0.5, 0.1, 2.0)
    assert kind.pattern(rank=4)["alpha_pattern"]["4"] == pytest.approx(2.0 * 2.0 * 2.0)
    with pytest.raises(UsageError, match="must leave a module: the largest scale is 2, got 3"):
        kind.pattern(rank=8, threshold=3)
    for wrong in ({"rank": 0}, {"rank": 2, "threshold": -1.0}):
        with pytest.raises(UsageError, match="got"):
            kind.pattern(**wrong)
    branch = AdapterScale(nn.Sequential(nn.Linear(4, 3)), "0")
    with pytest.raises(UsageError, match=r"must be asked of LoRA layers.*got 0"):
        branch.pattern(rank=2)


def test_one_of_several_adapters_is_scaled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(NamedLoRA(4, 3, "old", "new")).double()
    x, _ = rows(0)
    layer: Any = net[0]
    with pytest.raises(UsageError, match=r"which of 'old', 'new' is scaled in 0.*got None"):
        AdapterScale(net)
    with pytest.raises(UsageError, match=r"one of those of 0.*got 'nwe'"):
        AdapterScale(net, adapter="nwe")
    assert not layer._forward_hooks
    wanted = layer.base(x) + layer.lora_B["old"](layer.lora_A["old"](x)) * 2.0
    with_scales(AdapterScale(net, adapter="new"), 1e-9)
    torch.testing.assert_close(net(x), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("modules", "names"),
    [("2", ["2"]), (["*4", "0"], ["0", "4"]), ("?", ["0", "2", "4"]), (["1"], ["1"])],
)
def test_modules_are_chosen_by_names_and_patterns(modules: Any, names: list[str]) -> None:
    assert list(AdapterScale(make_net(), modules).layers()) == names


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(UsageError, match="must have LoRA layers"):
        AdapterScale(nn.Linear(3, 2))
    with pytest.raises(UsageError, match=r"got '2\.lora'; did you mean"):
        AdapterScale(make_net(), "2.lora")
    for init in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="init must be a scale above 0"):
            AdapterScale(make_net(), init=init)
    with pytest.raises(UsageError, match="must be left out"):
        AdapterScale(make_net(), "0", adapter="default")
    net: Any = make_net()
    net[2].scaling = nn.Parameter(torch.ones(()))
    with pytest.raises(UsageError, match=r"scaling of 2 must be a number.*got a Parameter"):
        AdapterScale(net)
    merging = nn.Sequential(TensorLoRA(4, 3, merge=True)).double()
    AdapterScale(merging)
    x, _ = rows(0)
    assert merging(x).shape == (12, 3)
    with pytest.raises(UsageError, match="0 must not be merged"):
        merging.eval()(x)
    lstm = nn.Sequential(nn.LSTM(4, 3)).double()
    AdapterScale(lstm, "0")
    assert isinstance(lstm(x), tuple)
    attention = nn.ModuleDict({"odd": nn.Identity(), "last": nn.Linear(4, 3)})
    AdapterScale(attention, "odd")
    with pytest.raises(UsageError, match="odd must return a tensor"):
        attention["odd"]({"a": 1})


def test_a_decay_for_each_module_is_that_of_its_tensors_together() -> None:
    net = make_net()
    net.append(nn.Linear(3, 3)).double()
    net.requires_grad_(True)
    kind = WeightDecay(net, "module", init=0.3)
    names = kind.layout.names()
    assert names == ["0.base", "0", "2", "4.base", "4", "5"]
    with torch.no_grad():
        for number, raw in enumerate(kind.raw):
            raw.fill_(float(number))
    layers: Any = [net.get_submodule(name) for name in names]
    layers[1] = nn.ModuleList([layers[1].lora_A, layers[1].lora_B])
    layers[4] = nn.ModuleList([layers[4].lora_A, layers[4].lora_B])
    strengths = [float(kind.transform.forward(raw.detach())) for raw in kind.raw]
    parts = [
        WeightDecay(layer, "model", init=s) for layer, s in zip(layers, strengths, strict=True)
    ]
    torch.testing.assert_close(kind(), torch.stack([part() for part in parts]).sum())
    slopes = torch.autograd.grad(kind(), list(kind.raw))
    for slope, part in zip(slopes, parts, strict=True):
        torch.testing.assert_close(slope, torch.autograd.grad(part(), list(part.raw))[0])
    alone = WeightDecay(LoRA(3, 3), "module")
    assert alone.layout.names() == ["the model"]
    assert set(kind.coarse_space()) == {"decay", *(f"factor.{name}" for name in names)}
