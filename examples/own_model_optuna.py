"""A model of your own under Optuna: what varies is searched, a decay per tensor is learned inside.

    python examples/own_model_optuna.py                      # 8 trials, about 20 seconds
    python examples/own_model_optuna.py --n-trials 50 --storage sqlite:///study.db

The study is a normal Optuna study: any sampler, pruner, storage, visualisation and dashboard works.
`make_problem` can be given to the command line too: ift-tune check own_model_optuna:make_problem
"""

from __future__ import annotations

import argparse

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn

import ift_tune
from ift_tune import Batches, Budget, Float, Int, MetaConfig, MetaSpace, Neumann, Splits


def make_problem(
    config: MetaConfig, device: torch.device, seed: int
) -> ift_tune.ClassificationProblem:
    """Return a small convolutional net on 8×8 digits with a decay for each parameter tensor."""
    torch.manual_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    x = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16)[order].to(device)
    y = torch.tensor(labels)[order].to(device)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 10)
    ).to(device)
    splits = Splits(
        train=Batches(x[:200], y[:200], batch_size=50, seed=seed),  # fits the weights
        val=Batches(x[200:400], y[200:400]),  # fits the decays
        search=Batches(x[400:800], y[400:800]),  # scores a trial
        test=Batches(x[800:], y[800:]),  # is only reported
        curvature=Batches(x[:200], y[:200]),
    )
    return ift_tune.ClassificationProblem(
        model, ift_tune.WeightDecay(model, per="tensor", init=1e-3), splits
    )


def main() -> None:
    """Run the study and print its best trial."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-trials", type=int, default=8)
    parser.add_argument("--outer-steps", type=int, default=20)
    parser.add_argument("--storage", default=None)
    options = parser.parse_args()

    objective = ift_tune.IFTObjective(
        make_problem,
        MetaSpace(
            {
                "terms": Int(0, 20),
                # α as a multiple of 1/λ_max: a value found here carries over to other nets
                "alpha_scale": Float(0.1, 1.5),
                "meta_lr": Float(1e-2, 0.5, log=True),
                "inner_steps": Int(5, 40, log=True),
            }
        ),
        Budget(outer_steps=options.outer_steps),
        config=MetaConfig(inverse=Neumann(), inner_lr=1e-2),
    )
    study = optuna.create_study(
        storage=options.storage,
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=5),
    )
    study.optimize(objective, n_trials=options.n_trials)
    print(study.trials_dataframe(attrs=("number", "value", "state", "params")).to_string())
    best = study.best_trial
    print(
        f"best: trial {best.number} {best.params}, search error {best.value:.3f}, "
        f"retrained test error {best.user_attrs['retrained_test_error']:.3f}"
    )


if __name__ == "__main__":
    main()
