"""Embeddings with sparse gradients train as dense ones do; what cannot is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ift_tune
from ift_tune import (
    Batches,
    ClassificationProblem,
    Compose,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    Splits,
    WeightDecay,
)
from ift_tune.base.errors import DoubleBackwardError
from ift_tune.testing import check_hypergradient

WORDS, CLASSES = 10, 3
IDS = torch.randint(WORDS, (24, 3), generator=torch.Generator().manual_seed(1))


class Bare(nn.Module):
    """The function that PyTorch's module is made of, or another that gives sparse gradients."""

    def __init__(self, sparse: bool, *, gather: bool = False) -> None:
        super().__init__()
        self.sparse, self.gather = sparse, gather
        self.words = nn.Parameter(torch.randn(WORDS, 4))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        if self.gather:
            places = ids.reshape(-1, 1).expand(-1, 4)
            rows = self.words.gather(0, places, sparse_grad=self.sparse).reshape(*ids.shape, 4)
        else:
            rows = torch.embedding(self.words, ids, -1, False, self.sparse)
        logits: Tensor = self.head(rows.flatten(1).tanh())
        return logits


def embedding(sparse: bool) -> nn.Module:
    layers = (
        nn.Embedding(WORDS, 4, sparse=sparse),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(12, CLASSES),
    )
    return nn.Sequential(*layers)


def bag(sparse: bool) -> nn.Module:
    return nn.Sequential(
        nn.EmbeddingBag(WORDS, 4, mode="mean", sparse=sparse), nn.Tanh(), nn.Linear(4, CLASSES)
    )


def problem(make: Any, sparse: bool) -> ClassificationProblem:
    torch.manual_seed(0)
    model = make(sparse)
    kinds = {"decay": WeightDecay(model, "tensor", init=0.05), "rows": ExampleWeights(len(IDS))}
    train = Batches(IDS, IDS[:, 0] % CLASSES, torch.arange(len(IDS)), batch_size=8)
    val = Batches(IDS.flip(0), IDS.flip(0)[:, 0] % CLASSES)
    return ClassificationProblem(model, Compose(kinds), Splits(train, val, val, val))


@pytest.mark.parametrize("make", [embedding, bag, Bare])
@pytest.mark.parametrize(
    "settings",
    [
        {"inner_optimizer": "sgd", "inner_lr": 0.1},
        {"inner_optimizer": "adam", "clip_norm": 0.1, "accumulate": 2},
        {"inner_optimizer": "rmsprop", "precision": "bfloat16"},
    ],
    ids=lambda settings: settings["inner_optimizer"],
)
def test_sparse_gradients_train_as_dense_ones(make: Any, settings: dict[str, Any]) -> None:
    found = []
    for sparse in (False, True):
        mine = problem(make, sparse)
        joint = JointOptimizer(mine, MetaConfig(inner_steps=3, meta_lr=0.1, **settings))
        for _ in range(2):
            joint.step()
        found.append([*mine.weights(), *mine.hypers()])
    torch.testing.assert_close(*found)


def test_the_hypergradient_is_right() -> None:
    check_hypergradient(problem(embedding, True), directions=1, unrolled_steps=3)


def test_sparse_gradients_without_a_stand_in_are_refused_by_name() -> None:
    mine = problem(lambda sparse: Bare(sparse, gather=True), True)
    joint = JointOptimizer(mine, MetaConfig(inner_steps=2))
    with pytest.raises(DoubleBackwardError, match=r"by words is sparse.*sparse_grad=True"):
        joint.step()


def test_a_bare_hypergradient_says_where_to_compute_the_losses() -> None:
    mine = problem(embedding, True)
    (batch,) = list(mine.splits.train)[:1]

    def answer() -> Any:
        return ift_tune.hypergradient(
            mine.train_loss(batch), mine.val_loss(batch), mine.model, mine.hyper
        )

    with pytest.raises(DoubleBackwardError, match=r"by 0.weight is sparse.*safe_kernels"):
        answer()
    with ift_tune.safe_kernels(mine.model):
        losses = mine.train_loss(batch), mine.val_loss(batch)
    found = ift_tune.hypergradient(*losses, mine.model, mine.hyper, penalty=mine.penalty())
    assert all(bool(g.isfinite().all()) for g in found.grads)
