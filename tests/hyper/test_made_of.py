"""A kind that was made of a model is refused beside another: λ is of weights, not of places."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ift_tune import ClassificationProblem, JointOptimizer, MetaConfig, Splits, UsageError
from ift_tune.hyper import (
    AdapterScale,
    Compose,
    DropoutRates,
    DropoutSite,
    HyperKind,
    L1Decay,
    WeightDecay,
)
from ift_tune.implicit.vectors import Tensors

BATCH = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
CONFIG = MetaConfig(inner_steps=1)


def net(inputs: int = 5, names: str = "ab") -> nn.Sequential:
    model = nn.Sequential()
    for number, name in enumerate(names):
        model.add_module(name, nn.Linear(5 if number else inputs, 5))
        model.add_module(f"{name}_tanh", nn.Tanh())
    model.add_module("last", nn.Linear(5, 2))
    return model


def problem(model: nn.Module, kind: HyperKind) -> ClassificationProblem:
    return ClassificationProblem(model, kind, Splits(*[[BATCH]] * 4))


MAKERS: dict[str, Callable[[nn.Module], HyperKind]] = {
    "decay": lambda model: WeightDecay(model, "tensor"),
    "one decay": lambda model: WeightDecay(model, "model"),
    "each weight": lambda model: L1Decay(model),
    "dropout": lambda model: DropoutRates(model, {"last": DropoutSite("unit", units=2)}),
    "scale": lambda model: AdapterScale(model, ["last"]),
    "composed": lambda model: Compose({"decay": WeightDecay(model, "channel")}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("other", [net(7), net(names="ba"), net(names="a")])
def test_a_kind_of_another_model_is_refused(
    make: Callable[[nn.Module], HyperKind], other: nn.Module
) -> None:
    told = r"must be made of the model that the problem trains.*a.weight \(5, 5\).*got one of"
    with pytest.raises(UsageError, match=told):
        JointOptimizer(problem(net(), make(other)), CONFIG)


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model,
        lambda model: model.last,
        lambda model: nn.ModuleList([model.a, model.last]),
        lambda model: nn.Sequential(model),
    ],
)
def test_a_kind_of_the_model_or_of_a_part_is_right(part: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    JointOptimizer(problem(model, WeightDecay(part(model), "tensor")), CONFIG).step()


def test_a_kind_of_a_copy_is_that_of_the_model() -> None:
    model = net()
    kind = WeightDecay(copy.deepcopy(model), "tensor", init=0.1)
    weights: Tensors = list(model.parameters())
    own = WeightDecay(model, "tensor", init=0.1).penalty().value(weights)
    found = problem(model, kind)
    penalty = found.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty.aligned(weights).value(weights), own)
    JointOptimizer(found, CONFIG).step()


def test_tensors_of_other_shapes_do_not_stand_in() -> None:
    penalty = WeightDecay(nn.Linear(7, 2), "tensor").penalty()
    with pytest.raises(UsageError, match="make it from the model"):
        penalty.aligned(list(nn.Linear(5, 2).parameters()))
    copies = [w.detach().clone().requires_grad_() for w in nn.Linear(7, 2).parameters()]
    assert penalty.aligned(copies) is penalty
