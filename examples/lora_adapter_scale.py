"""A character transformer of one text, tuned to another by LoRA: a learned scale for each adapter.

    python examples/lora_adapter_scale.py --data-root DIR      # a minute on one core
    python examples/lora_adapter_scale.py --embedded           # without files: Python's own texts

The transformer (0.2 million weights) learns docstrings of Python's library and is then frozen. Its
adapters are trained on a little Shakespeare (without files: on `help()`'s manual), while a scale
and a decay for each of them are learned. At the end: the losses on the new text, and the pattern of
ranks and alphas that `peft.LoraConfig` takes.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import (
    AdapterScale,
    Batches,
    Budget,
    ClassificationProblem,
    Compose,
    MetaConfig,
    Splits,
    WeightDecay,
)
from ift_tune.tasks.building import stretches
from ift_tune.tasks.datasets import load

WIDTH, LAYERS, HEADS, LENGTH = 64, 4, 4, 32
OLD, NEW = "docstrings", ("shakespeare", "manual")  # the second where there are no files
SIZES = {"train": 240, "val": 120, "search": 120, "test": 480}  # windows of LENGTH characters
DECAY = 1e-3  # where those of the adapters start
BATCH, LARGE = 24, 48  # of an inner and of an outer step
CONFIG = MetaConfig(
    inverse=ift_tune.Neumann(terms=3),
    meta_lr=0.1,
    inner_steps=10,
    inner_optimizer="adam",
    inner_lr=3e-3,
    reinit_every=15,  # outer steps: adapters that have memorised the text say nothing about λ
)


class LoRA(nn.Module):
    """A frozen linear layer, and a product of two thin matrices that is added to it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # at first nothing is changed

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs with the adapter's contribution."""
        changed: Tensor = self.base(x) + self.scaling * self.lora_B(self.lora_A(x))
        return changed


class Block(nn.Module):
    """Attention to the characters before, then a small net for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the changed stream, (B, T, WIDTH)."""
        heads = self.qkv(self.norms[0](x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        changed: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return changed


class Transformer(nn.Module):
    """Predicts each next character, logits (B, characters, T)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the successors."""
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits.movedim(-1, 1)


@functools.cache
def pretrained(root: str | None, embedded: bool, pretraining: int) -> tuple[Transformer, Tensor]:
    """Return the transformer of the old text, and the new text, both as they always are."""
    texts = load("texts", root=root, embedded=embedded)
    old, model = texts.characters[OLD], _fresh(len(texts.alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, pretraining)
    generator = torch.Generator().manual_seed(0)
    for _ in range(pretraining):
        starts = torch.randint(len(old) - LENGTH, (32, 1), generator=generator)
        rows = old[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, texts.characters[NEW[embedded]]


def _fresh(characters: int) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(characters)


def make_model(base: Transformer, rank: int, alpha: float) -> Transformer:
    """Return a frozen copy of the transformer with an adapter in every layer of its blocks."""
    model = Transformer(base.embedding.num_embeddings)
    model.load_state_dict(base.state_dict())
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LoRA(getattr(block, name), rank, alpha))
    return model


def make_problem(
    config: MetaConfig,
    device: torch.device,
    seed: int,
    *,
    root: str | None = None,
    embedded: bool = False,
    pretraining: int = 600,
    rank: int = 8,
    alpha: float = 16.0,
) -> ClassificationProblem:
    """Return the problem: λ are a scale and a decay for each adapter."""
    base, text = pretrained(root, embedded, pretraining)
    model = make_model(base, rank, alpha).to(device)
    decay = WeightDecay(model, per="module", init=DECAY)
    hyper = Compose({"scale": AdapterScale(model), "decay": decay})
    return ClassificationProblem(model, hyper, make_splits(text, device, seed))


def make_splits(text: Tensor, device: torch.device, seed: int) -> Splits:
    """Return four stretches of a text, cut into windows."""
    parts = stretches(text, LENGTH, list(SIZES.values()), seed)
    train, val, search, test = ([t.to(device) for t in part] for part in parts)
    return Splits(
        Batches(*train, batch_size=BATCH, seed=seed),
        Batches(*val, batch_size=LARGE, seed=seed),
        Batches(*search, batch_size=LARGE, shuffle=False),
        Batches(*test, batch_size=LARGE, shuffle=False),
        curvature=Batches(*train, batch_size=LARGE, seed=seed + 1),
    )


def main() -> None:
    """Run it, and print the pattern."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/lora_adapter_scale")
    parser.add_argument("--data-root")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--pretraining", type=int, default=600, metavar="STEPS")
    parser.add_argument("--outer-steps", type=int, default=40)
    parser.add_argument("--threshold", type=float, default=0.9, help="scales that are kept")
    args = parser.parse_args()
    factory = functools.partial(
        make_problem, root=args.data_root, embedded=args.embedded, pretraining=args.pretraining
    )
    before = factory(CONFIG, torch.device("cpu"), 0).measure("test")
    budget = Budget(args.outer_steps, eval_every=2)
    ift_tune.run_single(factory, budget, config=CONFIG, out=args.out, device="cpu")
    final: Any = ift_tune.load_best(args.out, factory, device="cpu")
    after, scale = final.measure("test"), final.hyper["scale"]
    print(f"test loss {before['loss']:.3f} before tuning, {after['loss']:.3f} after")
    for name, value in scale.summary().items():
        print(f"  {name}: scale {value:.2f}")
    pattern = scale.pattern(rank=8, threshold=args.threshold)
    print(f"kept, of rank: {pattern['rank_pattern']}")


if __name__ == "__main__":
    main()
