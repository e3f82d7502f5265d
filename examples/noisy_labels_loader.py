"""Noisy labels in a CNN with batch normalisation: a weight learned for each training example."""

import argparse
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ift_tune
from ift_tune import Budget, ClassificationProblem, ExampleWeights, MetaConfig, Splits

TRAIN, WRONG = 800, 240


def noisy_digits(seed: int) -> tuple[np.ndarray, list[TensorDataset]]:
    """Return which training labels are wrong, and the four splits as data sets."""
    draw, (pixels, labels) = np.random.default_rng(seed), load_digits(return_X_y=True)
    order, wrong = draw.permutation(len(labels)), np.arange(TRAIN) < WRONG
    images = torch.as_tensor(pixels[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.as_tensor(labels[order])
    labels[:WRONG] = (labels[:WRONG] + torch.as_tensor(draw.integers(1, 10, WRONG))) % 10
    train = TensorDataset(images[:TRAIN], labels[:TRAIN], torch.arange(TRAIN))
    bounds = ((TRAIN, 1000), (1000, 1400), (1400, 1797))
    return wrong, [train, *(TensorDataset(images[i:j], labels[i:j]) for i, j in bounds)]


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the problem; its training batches come from two worker processes."""
    sets = noisy_digits(seed)[1]
    workers: dict[str, Any] = {"shuffle": True, "num_workers": 2, "persistent_workers": True}
    train = DataLoader(sets[0], 50, drop_last=True, **workers)
    val, search, test = (DataLoader(each, 400) for each in sets[1:])
    whole = DataLoader(sets[0], TRAIN)  # of an outer step: every example's weight gets a gradient
    splits = Splits(train, val, search, test, curvature=whole)
    first = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))
    return ClassificationProblem(model, ExampleWeights(TRAIN), splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/noisy_labels_loader")
    parser.add_argument("--outer-steps", type=int, default=12)
    parser.add_argument("--k", type=int, nargs="*", default=[60, 120, 240])
    args = parser.parse_args()
    config = MetaConfig(inner_optimizer="sgd", inner_lr=0.1, meta_lr=0.5)
    budget = Budget(outer_steps=args.outer_steps)
    ift_tune.run_single(make_problem, budget, out=args.out, config=config, baseline=True)
    # The weights of the examples go on to improve when those of the net begin to memorise.
    weights: Any = ift_tune.load_best(args.out, make_problem, at="last").hyper
    for k in args.k:
        print(f"precision at {k}: {noisy_digits(0)[0][weights.suspects(k).numpy()].mean():.2f}")
    print(ift_tune.load_results(args.out).trials.filter(like="_test_error").to_dict("records"))
    final = ift_tune.refit(args.out, make_problem, data="train")
    print("final model, test:", final.measure("test"))
