"""What a kind of hyperparameters is made of is looked at before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ift_tune import (
    AdapterScale,
    AffineColorAugmentation,
    AugmentationNetwork,
    ClassWeights,
    Compose,
    DistilledData,
    DomainWeights,
    DropoutRates,
    ExampleScorer,
    ExampleWeights,
    HyperKind,
    L1Decay,
    LabelSmoothing,
    LossMixture,
    PositionWeights,
    UsageError,
    WeightDecay,
)
from ift_tune.hyper import KINDS

NET = nn.Sequential(nn.Linear(3, 2))
ROWS: Any = torch.ones(4, 3)
WRONG: list[tuple[type[HyperKind], tuple[Any, ...], dict[str, Any], str]] = [
    (ExampleWeights, (2.5,), {}, "examples must be an integer of at least 1, got 2.5"),
    (ExampleWeights, (ROWS,), {}, "examples must be an integer"),
    (ExampleWeights, (4,), {"like": "cuda"}, "like must be a tensor .* got 'cuda'"),
    (ExampleWeights, (4,), {"like": torch.arange(4)}, "like must be a tensor of real numbers"),
    (ClassWeights, (True,), {}, "classes must be an integer of at least 2, got True"),
    (ClassWeights, (3,), {"like": nn.Linear}, "like must be a tensor"),
    (LabelSmoothing, ("3",), {}, "classes must be an integer of at least 2, got '3'"),
    (LabelSmoothing, (3,), {"most": "all"}, "most must be a finite number .* got 'all'"),
    (LossMixture, (3,), {}, "losses must be a list of names, got 3"),
    (PositionWeights, ((4, 0),), {}, r"positions must be an integer .* got 0"),
    (DistilledData, (ROWS, [0, 1, 0, 1]), {}, "examples must be an integer"),
    (DistilledData, (4, 9), {}, r"shape must be that of one image, such as .* got 9"),
    (DistilledData, (4, (3, 0)), {}, "shape must be an integer of at least 1, got 0"),
    (DistilledData, (4, (3,)), {"labels": 4}, "labels must be a list of names, got 4"),
    (DistilledData, (4, (3,)), {"labels": np.arange(3)}, "each of the 4 images, got 3"),
    (DomainWeights, (4,), {}, "sources must be numbers from 0, or names"),
    (ExampleScorer, ("mlp",), {}, "network must be a module, .* got 'mlp'"),
    (ExampleScorer, (3,), {"init": "half"}, "init must be a finite number above 0, got 'half'"),
    (ExampleScorer, (3,), {"hidden": 0.5}, "hidden must be an integer of at least 1, got 0.5"),
    (ExampleScorer, (), {"features": np.ones((4, 3))}, r"features must be .* torch.as_tensor"),
    (ExampleScorer, (3,), {"features": "encoder"}, "features must be a tensor .* got 'encoder'"),
    (WeightDecay, ("net",), {}, "model must be an nn.Module, .* got 'net'"),
    (WeightDecay, (nn.Linear,), {}, "model must be an nn.Module, .* got <class"),
    (WeightDecay, (NET.parameters(),), {}, "model must be an nn.Module"),
    (WeightDecay, (NET,), {"exclude": 1}, "exclude must be a list of names, or a function, got 1"),
    (WeightDecay, (NET,), {"exclude": [NET[0]]}, "exclude must be a list of names, .* Linear"),
    (L1Decay, (None,), {}, "model must be an nn.Module, .* got None"),
    (L1Decay, (NET,), {"epsilon": "0.1"}, "epsilon must be a finite number .* got '0.1'"),
    (DropoutRates, ("net", {}), {}, "model must be an nn.Module"),
    (DropoutRates, (NET, ["0"]), {}, r"sites must be a mapping .* got \['0'\]"),
    (DropoutRates, (NET, {"0": 0.5}), {}, r"sites must map .* got {'0': 0.5}"),
    (AdapterScale, ({},), {}, "model must be an nn.Module"),
    (AdapterScale, (NET, 0), {}, "modules must be a list of names of submodules, got 0"),
    (AugmentationNetwork, ("rgb",), {}, "channels must be an integer of at least 1, got 'rgb'"),
    (AugmentationNetwork, (3,), {"shape": (3, 8)}, r"shape must be channels, height and width"),
    (AugmentationNetwork, (3,), {"bound": None}, "bound must be a finite number above 0, got None"),
    (AffineColorAugmentation, (), {"starts": 0.1}, "starts must be a mapping .* got 0.1"),
    (AffineColorAugmentation, (), {"starts": {"scale": "x"}}, "strength scale must be .* got 'x'"),
    (AffineColorAugmentation, (), {"shape": 8}, "shape must be channels, .* got 8"),
]


@pytest.mark.parametrize(("kind", "given", "named", "message"), WRONG)
def test_a_wrong_argument_is_named_in_a_sentence(
    kind: type[HyperKind], given: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        kind(*given, **named)
    assert ", got " in str(refused.value)


def test_each_kind_is_among_them() -> None:
    assert {kind for kind, *_ in WRONG} == set(KINDS.values())


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([ClassWeights(2)], r"mapping of names to kinds .* got \[ClassWeights"),
        ({}, "mapping of names to kinds"),
        ({"decay": WeightDecay}, "as decay, an object such as .* got <class"),
        ({"layer.decay": ClassWeights(2)}, "names without dots .* got 'layer.decay'"),
        ({"": ClassWeights(2)}, "names without dots .* got ''"),
        ({1: ClassWeights(2)}, "names without dots .* got 1"),
    ],
)
def test_a_wrong_composition_is_named_in_a_sentence(kinds: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Compose(kinds)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ExampleWeights(n),
        lambda n: ClassWeights(n),
        lambda n: LabelSmoothing(n, per="class"),
        lambda n: PositionWeights(n),
        lambda n: ExampleScorer(n, hidden=n),
        lambda n: DistilledData(n, (n,), labels=range(n)),
        lambda n: AugmentationNetwork(n, depth=1, width=n, shape=(n, n, n)),
    ],
)
def test_whole_numbers_of_numpy_are_numbers(make: Callable[[Any], HyperKind]) -> None:
    number: Any = np.int64(3)
    assert make(number).count == make(3).count
