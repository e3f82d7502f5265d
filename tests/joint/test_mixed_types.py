"""Weights of several types and λ of another: they train, and finite differences agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ift_tune import (
    Batches,
    ClassificationProblem,
    ClassWeights,
    Compose,
    ConjugateGradient,
    Dense,
    ExampleWeights,
    HyperKind,
    Identity,
    JointOptimizer,
    L1Decay,
    LabelSmoothing,
    MetaConfig,
    Neumann,
    Nystrom,
    Splits,
    WeightDecay,
    hypergradient,
    safe_kernels,
)
from ift_tune.testing import check_hypergradient

ROWS = 12


class Mixed(nn.Module):
    """A layer of each type, as where a sensitive head is kept in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2).double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs.to(self.body.weight.dtype)).tanh()
        logits: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return logits


def problem(model: nn.Module, hyper: HyperKind) -> ClassificationProblem:
    kind = next(model.parameters()).dtype
    inputs, targets = torch.randn(ROWS, 3).to(kind), torch.arange(ROWS) % 2
    train = Batches(inputs, targets, torch.arange(ROWS), batch_size=6)
    val = Batches(inputs.flip(0), targets)
    return ClassificationProblem(model, hyper, Splits(train, val, val, val))


def kinds(model: nn.Module) -> dict[str, HyperKind]:
    return {
        "decay": WeightDecay(model, "tensor", init=0.1),
        "l1": L1Decay(model, "model", init=0.05),
        "rows": ExampleWeights(ROWS),
        "classes": ClassWeights(2),
        "smoothing": LabelSmoothing(2, init=0.1),
    }


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    "single": lambda: nn.Linear(3, 2),
    "double": lambda: nn.Linear(3, 2).double(),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("hypers", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {"inner_optimizer": "sgd", "clip_norm": 0.1, "accumulate": 2},
        {"inverse": Neumann(terms=3), "precision": "bfloat16"},
        {"inverse": ConjugateGradient(max_steps=3), "warm_start": True},
        {"inverse": Nystrom(rank=3), "meta_optimizer": "sgd"},
        {"inverse": Dense(damping=0.1)},
        {"inverse": Identity(), "meta_optimizer": "momentum"},
    ],
    ids=["sgd", "neumann", "cg", "nystrom", "dense", "identity"],
)
def test_any_types_train(model: str, hypers: torch.dtype, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = MODELS[model]()
    mine = problem(net, Compose(kinds(net)).to(hypers))
    joint = JointOptimizer(mine, MetaConfig(inner_steps=2, meta_lr=0.1, **settings))
    before = [h.detach().clone() for h in mine.hypers()]
    for _ in range(2):
        joint.step()
    assert all(not torch.equal(h, b) for h, b in zip(mine.hypers(), before, strict=True))
    assert {h.dtype for h in mine.hypers()} == {hypers}
    batch = next(iter(mine.splits.train))
    with safe_kernels(net):
        losses = mine.train_loss(batch), mine.val_loss(batch)
    found = hypergradient(*losses, net, mine.hyper, penalty=mine.penalty(), inverse=Neumann(2))
    assert {g.dtype for g in found.grads} == {hypers}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("hypers", [torch.float32, torch.float64])
def test_any_types_have_the_right_hypergradient(model: str, hypers: torch.dtype) -> None:
    torch.manual_seed(0)
    net = MODELS[model]()
    chosen = {name: kind for name, kind in kinds(net).items() if name in ("decay", "rows")}
    check_hypergradient(problem(net, Compose(chosen).to(hypers)), directions=1, unrolled_steps=3)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_narrow_l1_decay_passes_the_check_at_the_start(kind: torch.dtype) -> None:
    """Its curvature changes within the step of a difference in single precision."""
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Linear(3, 2).to(kind)
        decay = L1Decay(net, "model", init=0.1, epsilon=1e-4)
        JointOptimizer(problem(net, decay), MetaConfig(inner_steps=1)).step()
