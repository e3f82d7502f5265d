"""Wrong labels found by an audit, and its CSV in a plain PyTorch training that knows nothing of it.

    python examples/clean_and_train.py

Weights for 900 handwritten digits, 30 % of whose labels are wrong, are learned from 200 clean ones.
The audit ranks the examples; a training of one's own then reads ``index`` and ``weight``.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune

TRAIN, WRONG = 900, 270
Rows = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Return four splits; the first 270 labels of the first are wrong."""
    draw, (pixels, labels) = np.random.default_rng(seed), load_digits(return_X_y=True)
    order = draw.permutation(len(labels))
    inputs, targets = torch.as_tensor(pixels[order] / 16).float(), torch.as_tensor(labels[order])
    targets[:WRONG] = (targets[:WRONG] + torch.as_tensor(draw.integers(1, 10, WRONG))) % 10
    ends = [TRAIN, TRAIN + 200, TRAIN + 400, len(targets)]
    first, second, third, rest = (
        (inputs[i:j], targets[i:j]) for i, j in zip([0, *ends[:-1]], ends, strict=True)
    )
    return first, second, third, rest


def net() -> nn.Module:
    """Return a small network."""
    return nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 10))


def make_problem(
    config: ift_tune.MetaConfig, device: torch.device, seed: int
) -> ift_tune.ClassificationProblem:
    """Return the problem: a weight for each training example, and one decay."""
    train, *others = digits(seed)
    val, search, test = (ift_tune.Batches(*rows) for rows in others)
    model = net()
    kinds = {
        "weights": ift_tune.ExampleWeights(TRAIN),
        "decay": ift_tune.WeightDecay(model, "model", init=1e-3, transform="exp"),
    }
    first = ift_tune.Batches(*train, torch.arange(TRAIN))
    splits = ift_tune.Splits(first, val, search, test)
    problem = ift_tune.ClassificationProblem(model, ift_tune.Compose(kinds), splits)
    problem.image_shape = (1, 8, 8)  # type: ignore[attr-defined]  # so that the page shows pictures
    return problem


def train_plainly(rows: Rows, weights: Tensor, steps: int = 300) -> nn.Module:
    """Train as anyone would who has a weight for each example."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(steps):
        losses = F.cross_entropy(model(rows[0]), rows[1], reduction="none")
        optimizer.zero_grad()
        loss: Any = (weights * losses).sum() / weights.sum()
        loss.backward()
        optimizer.step()
    return model


def error(model: nn.Module, rows: Rows) -> float:
    """Return the fraction of wrong answers."""
    with torch.no_grad():
        return float((model(rows[0]).argmax(dim=1) != rows[1]).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/clean_and_train")
    parser.add_argument("--outer-steps", type=int, default=60)
    args = parser.parse_args()
    config = ift_tune.MetaConfig(meta_lr=0.1, inner_steps=10, inner_lr=1e-2)
    budget = ift_tune.Budget(outer_steps=args.outer_steps, retrain=False)
    ift_tune.run_single(make_problem, budget, out=args.out, config=config)
    table = ift_tune.audit(args.out, make_problem, wrong=np.arange(TRAIN) < WRONG, folds=0)
    print(f"of the 100 most suspect labels {table['wrong'].head(100).sum()} are wrong")
    print(f"page: {Path(args.out, 'audit', 'audit.html')}")

    # From here on without this package: a file with a weight for each row.
    rows = pd.read_csv(Path(args.out, "audit", "audit.csv")).sort_values("index")
    weights = torch.tensor(rows["weight"].to_numpy(), dtype=torch.float32)
    train, _, _, test = digits(0)
    plain = error(train_plainly(train, torch.ones(TRAIN)), test)
    print(f"plain training, test error with all labels: {plain:.3f}")
    print(f"with the weights of the audit: {error(train_plainly(train, weights), test):.3f}")
