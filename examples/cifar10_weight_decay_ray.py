"""ResNet-18 on CIFAR-10 with 11 million decays under Ray Tune with ASHA, a GPU for each trial.

    python examples/cifar10_weight_decay_ray.py --data-root DIR              # this machine's GPUs
    python examples/cifar10_weight_decay_ray.py --data-root DIR --address auto --out /shared/runs
    python examples/cifar10_weight_decay_ray.py --embedded --gpus-per-trial 0    # seconds on a CPU

The space is that of cifar10_weight_decay_optuna.py. Without a GPU in the cluster it says so before
anything starts: `--gpus-per-trial 0` then runs on CPUs, where a step at full size takes minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
from cifar10_weight_decay_optuna import SPACE
from ray import tune

import ift_tune
from ift_tune import tasks
from ift_tune.search.ray import check_room


def main() -> None:
    """Run the search and print its best trial."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-trials", type=int, default=20)
    parser.add_argument("--outer-steps", type=int, default=200)
    parser.add_argument("--address", default="local")
    parser.add_argument("--gpus-per-trial", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument(
        "--data-root", default=None, help="on every node; default: the environment's"
    )
    parser.add_argument("--embedded", action="store_true", help="a tiny net on digits, no files")
    options = parser.parse_args()

    task = tasks.get("cifar10-weight-decay", data_root=options.data_root, embedded=options.embedded)
    ray.init(address=options.address, include_dashboard=False, log_to_driver=False)
    print(check_room(1, options.gpus_per_trial))  # Ray would wait for ever for what no node has
    every = min(20, options.outer_steps)
    trainable = ift_tune.ray_trainable(
        task.make_problem,
        SPACE,
        ift_tune.Budget(outer_steps=options.outer_steps, eval_every=every),
        config=task.default_config,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": options.gpus_per_trial}),
        param_space=SPACE.to_ray(),
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            num_samples=options.n_trials,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="outer_step", max_t=options.outer_steps, grace_period=every
            ),
            reuse_actors=not options.gpus_per_trial,
        ),
        run_config=ift_tune.recommended_run_config(
            options.out, "cifar10-weight-decay", stop=ift_tune.DivergenceStopper(), verbose=1
        ),
    )
    best = tuner.fit().get_best_result()
    trials, _ = ift_tune.load_results(options.out / "cifar10-weight-decay")
    print(trials[["trial", "stop_reason", "step", "search_error", *SPACE.distributions]])
    print(f"best: {best.config}, search error {trials['search_error'].min():.3f}")


if __name__ == "__main__":
    main()
