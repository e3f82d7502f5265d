"""What a trial costs beside its steps: the bare JointOptimizer, a trial, Optuna, and Ray Tune.

Each repeat runs the same number of outer steps of one task in every way, one way after the other;
printed are medians, and what a trial and an outer step cost beyond the bare optimiser.

    python benchmarks/trial_overhead.py --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ift_tune.search.backends import prepare_ray

prepare_ray(local=True)

import optuna  # noqa: E402
import ray  # noqa: E402
from ray import tune  # noqa: E402

from ift_tune import Budget, IFTObjective, JointOptimizer, MetaSpace, run_study, tasks  # noqa: E402
from ift_tune.search.ray import ray_trainable, recommended_run_config  # noqa: E402
from ift_tune.search.space import Choice  # noqa: E402

TASK = tasks.get("digits-weight-decay")
SPACE = MetaSpace({"terms": Choice((3,))})  # a point, so that all ways do the same work


def bare(steps: int, trials: int) -> None:
    """Step and evaluate, and nothing else."""
    for _ in range(trials):
        problem = TASK.make_problem(TASK.default_config, "cpu", 0)
        joint = JointOptimizer(problem, TASK.default_config.updated({"terms": 3}))
        for _ in range(steps):
            joint.step()
            joint.evaluate("search", charge=True)
            joint.evaluate("test")


def objective(steps: int, trials: int) -> None:
    """An Optuna study in memory, without tables."""
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    plan = (TASK.make_problem, SPACE, Budget(outer_steps=steps, retrain=False))
    study.optimize(IFTObjective(*plan, config=TASK.default_config), n_trials=trials)


def study(steps: int, trials: int) -> None:
    """A journal, tables and checkpoints: what the command line does."""
    with tempfile.TemporaryDirectory() as out:
        run_study(
            TASK.make_problem,
            SPACE,
            Budget(outer_steps=steps, retrain=False),
            n_trials=trials,
            out=Path(out, "run"),
            config=TASK.default_config,
        )


def tuner(steps: int, trials: int, *, reuse: bool, checkpoint_every: int) -> None:
    """Ray Tune, one trial at a time, with tables and checkpoints."""
    budget = Budget(outer_steps=steps, retrain=False)
    trainable = ray_trainable(TASK.make_problem, SPACE, budget, config=TASK.default_config)
    with tempfile.TemporaryDirectory() as out:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=SPACE.to_ray(),
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="min",
                num_samples=trials,
                max_concurrent_trials=1,
                reuse_actors=reuse,
            ),
            run_config=recommended_run_config(out, checkpoint_every=checkpoint_every, verbose=0),
        ).fit()


WAYS: dict[str, Callable[[int, int], None]] = {
    "bare JointOptimizer": bare,
    "Optuna, in memory": objective,
    "Optuna, journal and tables": study,
    "Ray Tune, a process a trial": lambda s, t: tuner(s, t, reuse=False, checkpoint_every=1),
    "Ray Tune, processes reused": lambda s, t: tuner(s, t, reuse=True, checkpoint_every=1),
    "the same, no checkpoints": lambda s, t: tuner(s, t, reuse=True, checkpoint_every=10**6),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="outer steps of a trial")
    parser.add_argument("--trials", type=int, default=4, help="trials of a search")
    parser.add_argument("--only", default="", help="ways whose names hold this, beside the bare")
    given = parser.parse_args()
    ways = {n: way for n, way in WAYS.items() if way is bare or given.only in n}
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    few, many = given.trials, 2 * given.trials
    runs = {"few": (given.steps, few), "long": (2 * given.steps, few), "many": (given.steps, many)}
    seconds: dict[str, dict[str, list[float]]] = {name: {r: [] for r in runs} for name in ways}
    for repeat in range(given.repeats + 1):  # the first is a warm-up
        for name, way in ways.items():
            for run, (steps, trials) in runs.items():
                started = time.perf_counter()
                way(steps, trials)
                if repeat:
                    seconds[name][run].append(time.perf_counter() - started)
    ray.shutdown()
    print(f"{TASK.name}: medians of {given.repeats} interleaved repeats, one thread each")
    print(f"{'':28}  {'s/trial':>8}  {'+ms/trial':>10}  {'+ms/outer step':>14}")
    base: tuple[float, float] | None = None
    for name, times in seconds.items():
        few_s, long_s, many_s = (statistics.median(times[r]) for r in runs)
        trial = (many_s - few_s) / (many - few)
        step = (long_s - few_s) / (few * given.steps)
        base = base or (trial, step)
        more = 1000 * (trial - base[0]), 1000 * (step - base[1])
        print(f"{name:28}  {trial:8.3f}  {more[0]:10.1f}  {more[1]:14.2f}")


if __name__ == "__main__":
    main()
