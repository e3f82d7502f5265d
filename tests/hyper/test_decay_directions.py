"""What is an output of a weight and what an input, held against what a layer's outputs need."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ift_tune import JointOptimizer, L1Decay, MetaConfig, RegressionProblem, Splits, WeightDecay
from ift_tune.base.views import HeatMap

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 2, 2), (2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 2, 2), (2, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 2, 2), (2, 3, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (2, 3, 4, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 2, 1), (2, 3, 2, 2, 2)),
}


def shared(kind: Any) -> list[Tensor]:
    """Return which weights of the first tensor each entry of its λ decays."""
    raw = kind.raw[0]
    spread = kind.decays()[0].expand(kind.layout.weights()[0].shape)
    found = []
    for place in range(raw.numel()):
        slopes = [torch.autograd.grad(c, raw, retain_graph=True)[0] for c in spread.flatten()]
        found.append(torch.stack([s.flatten()[place] != 0 for s in slopes]).reshape(spread.shape))
    return found


def on_outputs(layer: Any, inputs: Tensor, place: int) -> Tensor:
    """Return which weights an output's channel depends on."""
    outputs = layer(inputs).transpose(1, -1)[..., place]
    slope: Tensor = torch.autograd.grad(outputs.sum(), layer.weight)[0]
    return slope != 0


def on_inputs(layer: Any, inputs: Tensor, place: int) -> Tensor:
    """Return which weights an input's channel comes by."""
    alone = torch.zeros_like(inputs).transpose(1, -1)
    alone[..., place] = inputs.transpose(1, -1)[..., place]
    slope: Tensor = torch.autograd.grad(layer(alone.transpose(1, -1)).sum(), layer.weight)[0]
    return slope != 0


def require_directions(layer: nn.Module, inputs: Tensor) -> None:
    for kind in (WeightDecay, L1Decay):
        outs, ins = (shared(kind(layer, per)) for per in ("channel", "input"))
        assert (len(outs), len(ins)) == (2, 3)
        for place, mask in enumerate(outs):
            assert torch.equal(mask, on_outputs(layer, inputs, place))
        for place, mask in enumerate(ins):
            assert torch.equal(mask, on_inputs(layer, inputs, place))


@pytest.mark.parametrize("name", LAYERS)
def test_channels_are_outputs_and_inputs_are_inputs(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    require_directions(make(), torch.rand(shape) + 0.5)


@pytest.mark.filterwarnings("ignore")
def test_the_linear_layer_of_gpt2_too(peft: ModuleType) -> None:
    from transformers.pytorch_utils import Conv1D  # which peft needs

    torch.manual_seed(0)
    make: Any = Conv1D
    require_directions(make(2, 3), torch.rand(2, 3) + 0.5)


@pytest.mark.parametrize("per", ["channel", "input"])
def test_their_derivatives_are_those_of_autograd(per: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.Conv2d(2, 3, 2)).double()
    kind = WeightDecay(net, per, init=0.3)
    weights = kind.layout.weights()
    vector = [torch.randn_like(w) for w in weights]
    total = torch.stack([(c * w**2).sum() for c, w in zip(kind.decays(), weights, strict=True)])
    slopes = torch.autograd.grad(total.sum(), weights, create_graph=True)
    inner = torch.stack([(s * v).sum() for s, v in zip(slopes, vector, strict=True)]).sum()
    truth = torch.autograd.grad(inner, list(kind.raw))
    penalty = kind.penalty()
    for mine, theirs in zip(penalty.mixed(weights, vector), truth, strict=True):
        torch.testing.assert_close(mine, theirs)
    # Two models at once: each row is what it is alone.
    rows = [torch.stack([raw.detach(), raw.detach() + 1.0]) for raw in kind.raw]
    stacked = penalty.stacked(rows)
    assert stacked is not None
    both = stacked.mixed(*([torch.stack([t, t]) for t in ts] for ts in (weights, vector)))
    for mine, theirs in zip(both, truth, strict=True):
        torch.testing.assert_close(mine[0], theirs)


def test_groups_are_taken_as_they_lie() -> None:
    layer = nn.ConvTranspose2d(4, 4, 2, groups=4)
    assert [tuple(r.shape) for r in WeightDecay(layer, "channel").raw] == [(4, 1, 1, 1), (4,)]
    torch.manual_seed(0)
    inputs = torch.rand(2, 4, 3, 3) + 0.5
    for place, mask in enumerate(shared(WeightDecay(layer, "channel"))):
        assert torch.equal(mask, on_outputs(layer, inputs, place))
    wide = nn.ConvTranspose2d(4, 6, 2, groups=2)  # 4 inputs by 3 of each group's outputs
    assert [tuple(r.shape) for r in WeightDecay(wide, "input").raw] == [(1, 3, 1, 1), ()]


@pytest.mark.parametrize("per", ["channel", "input", "weight"])
def test_maps_have_outputs_as_rows(per: Any) -> None:
    layer = nn.ConvTranspose2d(3, 2, 2)
    kind = WeightDecay(layer, per)
    with torch.no_grad():
        for number in range(kind.raw[0].numel()):
            kind.raw[0].view(-1)[number] = float(number)
    maps = [np.asarray(v.values).shape for v in kind.views() if isinstance(v, HeatMap)]
    assert maps == {"channel": [], "input": [(1, 3)], "weight": [(2, 3)]}[per]


def test_a_net_that_decodes_is_tuned() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.ConvTranspose2d(3, 2, 2), nn.Flatten())
    rows = [(torch.randn(6, 3), torch.randn(6, 8))]
    for per in ("channel", "input"):
        kind = WeightDecay(net, per)
        problem = RegressionProblem(net, kind, Splits(rows, rows, rows, rows))
        JointOptimizer(problem, MetaConfig(inner_steps=2)).step()
        assert kind.learned()["1.weight"].numel() == {"channel": 2, "input": 3}[per]
