"""One objective under Optuna (a grid, NSGA-II) and under Ray Tune with ASHA, accuracy maximised."""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all of them before Ray is imported
import optuna
import ray
import torch
from ray import tune
from sklearn.datasets import load_digits

import ift_tune
from ift_tune import Budget, Choice, MetaConfig, MetaSpace, Splits

SPACE = {"terms": (0, 4), "inner_steps": (5, 20)}
SEARCH: dict[str, Any] = {"metric": "search_accuracy", "mode": "max"}  # and so Ray's "objective"


class AccuracyProblem(ift_tune.ClassificationProblem):
    """A classifier that reports its accuracy."""

    def metrics(self, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """Return the accuracy of a batch."""
        return {"accuracy": 1 - super().metrics(batch)["error"]}


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> AccuracyProblem:
    """Return the problem of one trial: softmax regression, a decay for each weight."""
    pixels, labels = load_digits(return_X_y=True)
    splits, model = Splits.from_arrays(pixels / 16, labels, batch_size=64), torch.nn.Linear(64, 10)
    return AccuracyProblem(model, ift_tune.WeightDecay(model), splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/optuna_and_ray"))
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--outer-steps", type=int, default=4)
    args = parser.parse_args()
    space = MetaSpace({key: Choice(values) for key, values in SPACE.items()})
    task = make_problem, space, Budget(args.outer_steps)
    stop = [optuna.study.MaxTrialsCallback(args.trials)]
    for sampler in (optuna.samplers.GridSampler(SPACE), optuna.samplers.NSGAIISampler(seed=0)):
        study = optuna.create_study(sampler=sampler, direction="maximize")
        study.optimize(ift_tune.IFTObjective(*task, **SEARCH), callbacks=stop)
        print(type(sampler).__name__, len(study.trials), study.best_params, study.best_value)
    ray.init(address="local", num_cpus=2, include_dashboard=False)  # no cluster that is near
    asha = tune.schedulers.ASHAScheduler("outer_step", max_t=args.outer_steps)
    goal: dict[str, Any] = {"metric": "objective", "mode": "max", "num_samples": args.trials}
    how: dict[str, Any] = {"tune_config": tune.TuneConfig(scheduler=asha, **goal)}
    how["run_config"] = ift_tune.recommended_run_config(args.out.resolve(), "asha", verbose=0)
    tuner = tune.Tuner(ift_tune.ray_trainable(*task, **SEARCH), param_space=space.to_ray(), **how)
    found: Any = tuner.fit().get_best_result()
    best = ift_tune.load_best(found.checkpoint.path, make_problem)
    print("ASHA", found.config, found.metrics["objective"], best.measure("search"))
