"""Folding leaves what the model does, or is refused with the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import AdapterScale, UsageError


class LoRA(nn.Module):
    def __init__(self, second: nn.Linear, first: nn.Linear | None = None) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A, self.lora_B = first or nn.Linear(4, 2, bias=False), second
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.scaling * self.lora_B(self.lora_A(x))
        return found


class Tied(nn.Module):
    """Words and the head have their weights in common, as one parameter or by memory alone."""

    def __init__(self, by_memory: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        weight = self.words.weight
        self.head.weight = nn.Parameter(weight.data) if by_memory else weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.words(x.abs().long() % 5)))
        return found


class Twice(nn.Module):
    """A function uses a layer's weight beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + F.linear(x, self.layer.weight)
        return found


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self[0](x)
        return found


class Averaged(nn.Module):
    """Keeps a buffer that is a view of a layer's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("bias", self.layer.bias.detach()[1:])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)[:, 1:] + self.get_buffer("bias")
        return found


def shared_second() -> nn.Module:
    second = nn.Linear(2, 4, bias=False)
    return nn.Sequential(LoRA(second), LoRA(second))


def shared_inside() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Sequential(layer, nn.Tanh(), layer))


def both_factors() -> nn.Module:
    factor = nn.Linear(4, 4, bias=False)
    return nn.Sequential(LoRA(factor, factor))


SHARED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a tied head": (lambda: Tied(by_memory=False), "head", "head must.*that words.weight has"),
    "tied by memory": (lambda: Tied(by_memory=True), "head", "head must.*that words.weight has"),
    "one B of two layers": (shared_second, "0", "0 must.*that 1.lora_B.weight has"),
    "B is A": (both_factors, "0", "0 must.*that 0.lora_B.weight has"),
    "first and last of a sequence": (shared_inside, "0", "0 must.*that 0.2.weight has"),
    "a buffer": (Averaged, "layer", "layer must.*that bias has"),
    "two sites": (
        lambda: nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(4, 4))),
        ["0", "0.1"],
        "0.1 must.*that 0 has",
    ),
    "a layer of its own": (lambda: nn.Sequential(Gated(4, 4)), "0", "plain linear.*got a Gated"),
    "a block of its own": (
        lambda: nn.Sequential(Residual(nn.Linear(4, 4))),
        "0",
        "plain linear.*got a Residual",
    ),
}


def state_of(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    tensors = [t.clone() for t in model.state_dict().values()]
    hooks = [list(m._forward_pre_hooks) + list(m._forward_hooks) for m in model.modules()]
    return tensors, hooks


def require_unchanged(model: nn.Module, before: tuple[list[Tensor], list[Any]]) -> None:
    tensors, hooks = state_of(model)
    assert hooks == before[1]
    assert all(torch.equal(one, two) for one, two in zip(tensors, before[0], strict=True))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_weights_that_something_else_has_are_refused(name: str, given: bool) -> None:
    torch.manual_seed(0)
    make, modules, message = SHARED[name]
    model, x = make(), torch.randn(3, 4)
    kind = AdapterScale(model, modules, init=0.5)
    wanted, before = model(x), state_of(model)
    with pytest.raises(UsageError, match=message):
        kind.fold(x if given else None)
    require_unchanged(model, before)
    torch.testing.assert_close(model(x), wanted, rtol=0.0, atol=0.0)


def test_what_a_function_does_with_the_weights_is_seen_by_what_comes_out() -> None:
    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(3, 4, dtype=torch.float64)
    kind = AdapterScale(model, "layer", init=0.5)
    model.layer.register_forward_hook(lambda _m, _i, output: None)  # after it, and it stays so
    wanted, before = model(x), state_of(model)
    with pytest.raises(UsageError, match="must leave what the model does: something beside"):
        kind.fold(x)
    require_unchanged(model, before)
    torch.testing.assert_close(model(x), wanted, rtol=0.0, atol=0.0)
    kind.fold()  # nobody sees it
    torch.testing.assert_close(model(x), wanted - 0.5 * x @ model.layer.weight.T * 2.0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.attn(x, x, x, need_weights=False)[0])
        return found


def test_a_scale_that_has_not_acted_is_not_folded(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(2, 5, 4)
    kind = AdapterScale(model, ["attn.out_proj", "head"], init=0.5)
    before = state_of(model)
    with pytest.raises(UsageError, match=r"must be called by the model.*got attn.out_proj, not"):
        kind.fold(x)
    require_unchanged(model, before)
    with torch.no_grad():
        wanted = model(x)
    with pytest.raises(UsageError, match=r"must be called by the model.*got attn.out_proj, not"):
        kind.fold()
    kind = AdapterScale(model, "head", init=0.5)
    kind.fold()
    assert "the model has not been called since its scales were made" in caplog.text
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("given", [False, True])
def test_what_is_there_twice_as_a_whole_is_folded(given: bool) -> None:
    """A layer that is called twice, under two names, is scaled in both calls."""
    torch.manual_seed(0)
    layer = LoRA(nn.Linear(2, 4))
    model = nn.ModuleDict({"one": nn.Sequential(layer, nn.Dropout()), "two": layer})
    whole = nn.Sequential(model["one"], nn.BatchNorm1d(4), model["two"]).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    kind = AdapterScale(whole, init=0.5)
    assert kind.names == ("0.0",)
    modes = [m.training for m in whole.modules()]
    before = [b.clone() for b in whole.buffers()]
    if not given:
        whole.eval()(x)
        kind.fold()
    else:
        kind.fold(x)
        assert [m.training for m in whole.modules()] == modes
        assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), before, strict=True))
    again = LoRA(nn.Linear(2, 4)).double()
    again.load_state_dict(layer.state_dict())
    again.scaling *= 0.5
    with torch.no_grad():
        again.lora_B.weight.mul_(2.0)
        again.lora_B.bias.mul_(2.0)
    torch.testing.assert_close(layer(x), again(x))
    assert not layer._forward_hooks


def test_inputs_may_have_names() -> None:
    torch.manual_seed(0)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(values)}

    model, x = Named().bfloat16(), torch.randn(3, 4).bfloat16()
    batch = {"values": x, "labels": torch.zeros(3)}
    kind = AdapterScale(model.float(), "layer", init=0.3)
    model.bfloat16()
    wanted = model(x)["logits"]
    kind.fold(batch)
    torch.testing.assert_close(model(x)["logits"], wanted, rtol=0.02, atol=0.01)
