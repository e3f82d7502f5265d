"""What shares a decay where there is one for each module: the modules say it, not their names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ift_tune import AdapterScale, L1Decay, WeightDecay


class LoRA(nn.Module):
    """A layer of the form; what it multiplies by has whatever name."""

    def __init__(self, base: nn.Module, factor: str = "scaling") -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lora_B = nn.Linear(2, 4, bias=False)
        self.lora_extras = nn.ModuleDict({"gate": nn.Linear(4, 1), "norm": nn.LayerNorm(4)})
        setattr(self, factor, 2.0)


class Block(nn.Module):
    """Layers whose own names look like those of parts of an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_q, self.lora_v = LoRA(nn.Linear(4, 4)), LoRA(nn.Linear(4, 4), "alpha")
        self.lora_norm, self.xlora_ = nn.LayerNorm(4), nn.Linear(4, 4)
        self.lora_gain = nn.Parameter(torch.ones(4))


def shared_by(kind: Any) -> dict[str, list[str]]:
    """Return the tensors that have each λ, by its name, from what λ does to the penalty."""
    found: dict[str, list[str]] = {}
    weights = kind.layout._model.named_parameters()
    names = [name for name, weight in weights if weight.requires_grad]
    decays = kind.decays()
    for label, raw in zip(kind.layout.names(), kind.raw, strict=True):
        slopes = torch.autograd.grad(
            torch.stack([d.sum() for d in decays]),
            raw,
            torch.eye(len(decays)),
            is_grads_batched=True,
            retain_graph=True,
        )
        found[label] = [n for n, slope in zip(names, slopes[0], strict=True) if slope != 0]
    return found


def adapter_in(layer: str) -> list[str]:
    parts = ("A.weight", "B.weight", "extras.gate.weight", "extras.gate.bias")
    norm = ("extras.norm.weight", "extras.norm.bias")
    return [f"{layer}.lora_{part}" for part in (*parts, *norm)]


@pytest.mark.parametrize("kind", [WeightDecay, L1Decay])
def test_modules_may_have_any_names(kind: Any) -> None:
    model = nn.ModuleDict({"lora_blocks": nn.ModuleList([Block()]), "explora_net": nn.Linear(4, 2)})
    block = "lora_blocks.0"
    wanted = {
        block: [f"{block}.lora_gain"],
        f"{block}.lora_q.base": [f"{block}.lora_q.base.{n}" for n in ("weight", "bias")],
        f"{block}.lora_q": adapter_in(f"{block}.lora_q"),
        f"{block}.lora_v.base": [f"{block}.lora_v.base.{n}" for n in ("weight", "bias")],
        f"{block}.lora_v": adapter_in(f"{block}.lora_v"),
        f"{block}.lora_norm": [f"{block}.lora_norm.{n}" for n in ("weight", "bias")],
        f"{block}.xlora_": [f"{block}.xlora_.{n}" for n in ("weight", "bias")],
        "explora_net": ["explora_net.weight", "explora_net.bias"],
    }
    assert shared_by(kind(model, "module")) == wanted
    assert AdapterScale(model).names == (f"{block}.lora_q",)  # the other has no scaling


def test_a_layer_around_a_layer_has_a_decay_of_its_own() -> None:
    inner = LoRA(nn.Linear(4, 4).requires_grad_(False))
    model = nn.Sequential(LoRA(inner))
    wanted = {"0.base": adapter_in("0.base"), "0": adapter_in("0")}
    assert shared_by(WeightDecay(model, "module")) == wanted
    assert set(shared_by(WeightDecay(inner, "module"))) == {"the model"}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_q, self.words, self.head = nn.Linear(4, 4), nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.lora_q(self.words(ids)))
        return found


@pytest.mark.filterwarnings("ignore")
def test_layers_of_peft_have_one_each(peft: ModuleType) -> None:
    def adapted(**settings: Any) -> nn.Module:
        targets = ["lora_q", "words", "head"]
        found: nn.Module = peft.get_peft_model(
            Plain(), peft.LoraConfig(r=2, target_modules=targets, **settings)
        )
        return found

    own = "base_model.model."
    factors = {"lora_q": "lora_{}.default.weight", "words": "lora_embedding_{}.default"}
    factors["head"] = factors["lora_q"]
    wanted = {layer: [f"{own}{layer}.{f.format(x)}" for x in "AB"] for layer, f in factors.items()}
    assert shared_by(WeightDecay(adapted(), "module")) == wanted
    dora = shared_by(WeightDecay(adapted(use_dora=True), "module"))
    assert list(dora) == list(wanted)
    assert [len(tensors) for tensors in dora.values()] == [3, 3, 3]  # and the magnitudes
    # Two such models in one: by the names without peft's part, layers of both would be one.
    both = nn.ModuleDict({"one": adapted(), "two": adapted()})
    names = [f"{model}.{own}{layer}" for model in ("one", "two") for layer in wanted]
    assert list(shared_by(WeightDecay(both, "module"))) == names
    assert AdapterScale(both).names == tuple(names)
