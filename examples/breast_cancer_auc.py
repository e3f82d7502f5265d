"""An MLP on breast_cancer: AUC maximised, a weight decay learned for each of the 30 features."""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import nn

import ift_tune
from ift_tune import Budget, Float, Int, MetaConfig, MetaSpace, Splits, WeightDecay


class AUCProblem(ift_tune.ClassificationProblem):
    """Binary classification that also reports the AUC of a whole split."""

    def evaluate(self, batches: Iterable[Any]) -> dict[str, Any]:
        """Return the loss, the error and, where both classes are present, the AUC."""
        pairs = [(self.model(inputs).flatten(), targets) for inputs, targets in batches]
        scores, targets = (torch.cat(column).cpu() for column in zip(*pairs, strict=True))
        both = 0 < targets.sum() < len(targets)
        auc = roc_auc_score(targets, scores) if both else float("nan")
        return {**super().evaluate(batches), "auc": auc}


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> AUCProblem:
    """Return the problem of one trial, with ``config.user["width"]`` hidden units."""
    features, classes = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    splits = Splits.from_arrays(
        *(features, classes), sizes=(0.2, 0.3, 0.25, 0.25), seed=seed, stratify=True, batch_size=32
    )
    first, last = nn.Linear(30, config.user["width"]), nn.Linear(config.user["width"], 1)
    decay = WeightDecay(first, "input", init=1e-3, transform="exp", exclude="bias")
    return AUCProblem(nn.Sequential(first, nn.ReLU(), last), decay, splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/breast_cancer_auc")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--outer-steps", type=int, default=15)
    args = parser.parse_args()
    config = MetaConfig(inner_steps=10, inner_lr=0.01, inner_schedule="cosine", clip_norm=1.0)
    space = MetaSpace({"meta_lr": Float(0.03, 0.3, log=True), "user.width": Int(8, 32, step=8)})
    search: dict[str, Any] = {"config": config, "metric": "search_auc", "mode": "max"}
    budget = Budget(args.outer_steps)
    result = ift_tune.run_study(
        make_problem, space, budget, n_trials=args.trials, out=args.out, device="cpu", **search
    )
    final = ift_tune.refit(args.out, make_problem, data="train+val", device="cpu")
    print("best:", result.best, "\nrefitted on train+val:", final.measure("test"))
    print("predicted:", (final.model(next(iter(final.splits.test))[0])[:, 0] > 0).long().tolist())
    hyper: Any = final.hyper
    for name, decay in zip(load_breast_cancer().feature_names, hyper.decays()[0][0], strict=True):
        print(f"{name:25s} {decay:.2e}")
