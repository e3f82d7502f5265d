"""The model of own_model_optuna.py under a Ray Tune Tuner of your own, with ASHA.

    python examples/own_model_ray.py                                  # here, 8 trials
    python examples/own_model_ray.py --address auto --gpus 1 --out /shared/runs   # on a cluster

Searcher, scheduler, stoppers and loggers are Ray's; the tables in --out/own-model are ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
from own_model_optuna import make_problem
from ray import tune

import ift_tune
from ift_tune import Budget, Float, Int, MetaConfig, MetaSpace, Neumann
from ift_tune.search.ray import check_room


def main() -> None:
    """Run the search and print its best trial."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-trials", type=int, default=8)
    parser.add_argument("--outer-steps", type=int, default=20)
    parser.add_argument("--address", default="local")
    parser.add_argument("--gpus", type=float, default=0.0, help="of a trial")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()

    ray.init(address=options.address, include_dashboard=False, log_to_driver=False)
    print(check_room(1, options.gpus))  # Ray would wait for ever for what no node has
    space = MetaSpace(
        {
            "terms": Int(0, 20),
            # α as a multiple of 1/λ_max: a value found here carries over to other nets
            "alpha_scale": Float(0.1, 1.5),
            "meta_lr": Float(1e-2, 0.5, log=True),
            "inner_steps": Int(5, 40, log=True),
        }
    )
    trainable = ift_tune.ray_trainable(
        make_problem,
        space,
        Budget(outer_steps=options.outer_steps),
        config=MetaConfig(inverse=Neumann(), inner_lr=1e-2),
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": options.gpus}),
        param_space=space.to_ray(),
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            num_samples=options.n_trials,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="outer_step", max_t=options.outer_steps, grace_period=1
            ),
            reuse_actors=not options.gpus,
        ),
        run_config=ift_tune.recommended_run_config(
            options.out, "own-model", stop=ift_tune.DivergenceStopper(), verbose=1
        ),
    )
    best = tuner.fit().get_best_result()
    trials, _ = ift_tune.load_results(options.out / "own-model")
    print(trials[["trial", "stop_reason", "step", "search_error", *space.distributions]])
    print(f"best: {best.config}, search error {trials['search_error'].min():.3f}")


if __name__ == "__main__":
    main()
