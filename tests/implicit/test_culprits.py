"""What may be behind a wrong second derivative is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ift_tune.implicit.culprits import name_culprits

INPUTS = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)


class _Frozen(torch.autograd.Function):
    """A square whose backward does not see that it depends on its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = 2.0 * ctx.kept * gradient
        return found


def _apply(function: Callable[..., Any]) -> Callable[[nn.Module], Tensor]:
    return lambda model: function(model(INPUTS)).sum()


def _layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def _hooked(attach: Callable[[nn.Linear], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = _layer()
        attach(layer)
        return nn.Sequential(layer)

    return build


def _checkpointed(model: nn.Module) -> Tensor:
    found: Tensor = checkpoint(model, INPUTS, use_reentrant=False)
    return found.sum()


def _under_autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs: Tensor = model(INPUTS)
    return outputs.float().sum()


PLAIN = _apply(torch.tanh)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], str]] = {
    "nothing": (_layer, PLAIN, ""),
    "custom function": (_layer, _apply(_Frozen.apply), "the custom function _Frozen"),
    "weight norm": (
        lambda: nn.Sequential(nn.Tanh(), parametrizations.weight_norm(_layer())),
        PLAIN,
        "weight_norm's kernel (which takes the norm for a constant) of 1:",
    ),
    "signs on a diagonal": (
        lambda: parametrizations.orthogonal(_layer(), orthogonal_map="householder"),
        PLAIN,
        "orthogonal with householder at parametrizations.weight.0",
    ),
    "hook on a weight": (
        _hooked(lambda m: m.weight.register_hook(torch.tanh)),  # type: ignore[no-untyped-call]
        PLAIN,
        "a gradient hook on 0.weight",
    ),
    "optimiser in the backward pass": (
        _hooked(
            lambda m: m.bias.register_post_accumulate_grad_hook(id)  # type: ignore[no-untyped-call]
        ),
        PLAIN,
        "a hook on 0.bias after its gradient is accumulated",
    ),
    "hook on a module": (
        _hooked(lambda m: m.register_full_backward_hook(lambda *_: None)),
        PLAIN,
        "a backward hook of 0 (Linear)",
    ),
    "checkpoint": (_layer, _checkpointed, "an activation checkpoint"),
    "autocast": (_layer, _under_autocast, "values in bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named(case: str) -> None:
    build, loss, expected = CASES[case]
    model = build()
    found = name_culprits(loss(model), model)
    assert len(found) == bool(expected)
    assert not expected or expected in found[0]
