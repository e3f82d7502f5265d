"""Problems that several processes share, in double precision, and some that none can share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import BilevelProblem, ClassificationProblem, MetaConfig
from ift_tune.problem.batches import Batch, Batches

EXAMPLES = 23
NUMBERS = "SHARED_PROBLEMS_NUMBERS"
"""The variable that names a file, to which each process that builds a problem adds its number."""

REAL = torch.float64


def make(
    config: MetaConfig, device: torch.device, seed: int, *, kind: str = "decay"
) -> BilevelProblem:
    """Return a small smooth net with λ of a kind; a batch of 7 has shares of 3 and 4.

    Validation batches are of 9 examples, or of a lone one, which only one process can have.
    """
    if file := os.environ.get(NUMBERS):
        with Path(file).open("a") as numbers:
            numbers.write(f"{os.getpid()}\n")
    draw = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(4 * EXAMPLES, 5, generator=draw, dtype=REAL)
    targets = (inputs[:, :3] + torch.randn(len(inputs), 3, generator=draw, dtype=REAL)).argmax(1)
    between: dict[str, nn.Module] = {"dropout": nn.Dropout(0.2), "batchnorm": nn.BatchNorm1d(6)}
    bend = nn.ReLU() if kind == "mixed" else nn.Tanh()
    layers = [nn.Linear(5, 6), between.get(kind, nn.Identity()), bend, nn.Linear(6, 3)]
    model = nn.Sequential(*layers).to(REAL)
    hyper: ift_tune.HyperKind
    if kind in ("decay", "fails", "dies"):
        hyper = ift_tune.WeightDecay(model, "weight", init=1e-2)
    elif kind == "examples":
        hyper = ift_tune.ExampleWeights(EXAMPLES)
    elif kind == "weighed":
        sources = [k % 3 for k in range(EXAMPLES)]
        hyper = ift_tune.Compose(
            {
                "sources": ift_tune.DomainWeights(sources, floor=0.1, max_repetition=2.0),
                "inputs": ift_tune.ExampleScorer(5, hidden=3),
                "losses": ift_tune.ExampleScorer(sees="loss", hidden=2),
            }
        )
    else:
        hyper = ift_tune.Compose(
            {
                "smoothing": ift_tune.LabelSmoothing(3),
                "decay": ift_tune.WeightDecay(model, "tensor", init=1e-2),
            }
        )
    if kind == "padding":
        targets = targets.masked_fill(torch.rand(len(targets), generator=draw) < 0.3, -100)
    parts = [slice(i * EXAMPLES, (i + 1) * EXAMPLES) for i in range(4)]
    index = [torch.arange(EXAMPLES)] if kind in ("examples", "weighed") else []
    train = Batches(inputs[parts[0]], targets[parts[0]], *index, batch_size=7, seed=seed)
    size = 1 if kind == "lone" else 9
    val = Batches(inputs[parts[1]], targets[parts[1]], batch_size=size, seed=seed)
    search, test = (Batches(inputs[p], targets[p]) for p in parts[2:])
    curvature = Batches(inputs[parts[0]], targets[parts[0]]) if kind == "mixed" else None
    splits = ift_tune.Splits(train, val, search, test, curvature)
    if kind == "domains":
        return _Domains(model, splits)
    problem: BilevelProblem = _PROBLEMS.get(kind, ClassificationProblem)(
        model, hyper.to(REAL), splits
    )
    return problem


class _Domains(BilevelProblem):
    """A weight for each class; a loss sees those of the classes that are among its examples."""

    hyper: nn.ParameterList

    def __init__(self, model: nn.Module, splits: ift_tune.Splits) -> None:
        self.model, self.splits = model, splits
        self.hyper = nn.ParameterList([torch.tensor(0.1 * i, dtype=REAL) for i in range(3)])

    def train_loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
        parts = [self.hyper[c].exp() * losses[batch[1] == c].sum() for c in batch[1].unique()]
        return torch.stack(parts).sum() / len(losses)

    def val_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


class _Ranked(ClassificationProblem):
    """Its loss compares the examples of a batch with each other."""

    def train_loss(self, batch: Batch) -> Tensor:
        scores: Tensor = self.model(batch[0])
        return super().train_loss(batch) + (scores.max(dim=0).values - scores).mean()


class _Summed(ClassificationProblem):
    """Its losses are sums over examples."""

    def val_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum")


class _Late(ClassificationProblem):
    """Its loss couples the examples of a batch when it has been taken for a while."""

    calls = 0

    def train_loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        loss = super().train_loss(batch)
        return loss if self.calls < 40 else loss + 1e-3 * self.model(batch[0]).mean() ** 2


class _Fails(ClassificationProblem):
    """Goes wrong on the share of the second process, in the third outer step or so."""

    calls = 0

    def train_loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls > 20 and len(batch[0]) == 4:
            self.fail()
        return super().train_loss(batch)

    def fail(self) -> None:
        raise ZeroDivisionError("a mistake in the second share")


class _Dies(_Fails):
    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


_PROBLEMS: dict[str, Any] = {
    "ranked": _Ranked,
    "summed": _Summed,
    "late": _Late,
    "fails": _Fails,
    "dies": _Dies,
}
