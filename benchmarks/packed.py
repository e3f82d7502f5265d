"""Trials a minute with --pack against one by one, interleaved, and operations begun a trial.

    python benchmarks/packed.py --task digits-weight-decay --packs 4 16 64
    python benchmarks/packed.py --compare random,tpe,val --packs 16 --repeats 1

With ``--compare`` the trials are those of a comparison of these arms, with as many searches as the
pack has room for.

One process, one thread, evaluations and retraining included, the study in memory (how fast a disk
writes is no matter of packing). Operations are those that PyTorch dispatches below autograd, but
for views: on a GPU each is a kernel to launch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ift_tune import (
    Budget,
    Comparison,
    Float,
    Int,
    MetaConfig,
    MetaSpace,
    run_comparison,
    run_study,
    tasks,
)

SPACE = {
    "meta_lr": Float(0.01, 0.1, log=True),
    "inner_lr": Float(1e-3, 1e-2, log=True),
    "alpha_scale": Float(0.3, 1.0),
}
VARIED = {**SPACE, "terms": Int(0, 8), "inner_steps": Int(15, 25)}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


def searched(task: tasks.Task, space: dict[str, Any], steps: int, trials: int, pack: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_study(
            task.make_problem,
            MetaSpace(space),
            Budget(outer_steps=steps),
            n_trials=trials,
            out=Path(folder, "run"),
            config=MetaConfig.from_flat(task.settings),
            device="cpu",
            sampler="random",
            storage=optuna.storages.InMemoryStorage(),
            pack=pack,
        )


def compared(task: tasks.Task, arms: list[str], trainings: float, seeds: int, pack: int) -> int:
    steps = (task.budget.outer_steps or 0) * task.default_config.inner_steps  # of a plain training
    whole = Comparison(
        task.make_problem,
        Budget(gradient_equivalents=trainings * steps),
        config=task.default_config,
        trial_budget=task.budget,
        training_steps=steps,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        return len(run_comparison(whole, out=out, arms=arms, seeds=seeds, pack=pack).trials)


def seconds(work: Any, *arguments: Any) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu, found


def measure_comparisons(task: tasks.Task, given: argparse.Namespace) -> None:
    arms = given.compare.split(",")
    print("pack  searches  trials  a minute of wall time  of CPU time: one by one and packed")
    for pack in given.packs:
        seeds = max(1, pack // len(arms))
        for _ in range(given.repeats):
            alone, together = (
                seconds(compared, task, arms, given.trainings, seeds, size) for size in (1, pack)
            )
            rates = [60 * run[2] / run[clock] for clock in (0, 1) for run in (alone, together)]
            print(
                f"{pack:4}  {seeds * len(arms):8}  {together[2]:6}  {rates[0]:10.0f} "
                f"{rates[1]:10.0f}  {rates[2]:11.0f} {rates[3]:10.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="digits-weight-decay")
    parser.add_argument("--packs", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=40, help="outer steps of a trial")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare", metavar="ARM,...", help="measure a comparison of these arms")
    parser.add_argument("--trainings", type=float, default=3, help="of each search of it")
    parser.add_argument("--varied", action="store_true", help="terms and inner steps vary too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task, space = tasks.get(given.task), VARIED if given.varied else SPACE
    seconds(searched, task, space, 2, 2, 1)  # what is imported and compiled at the first use
    if given.compare:
        measure_comparisons(task, given)
        return
    print(
        "pack  trials  one by one  packed  (wall s a trial)  ratio  ratio of CPU time  operations"
    )
    for pack in given.packs:
        few = min(pack, 8)
        walls: list[tuple[float, float]] = []
        cpus: list[tuple[float, float]] = []
        for _ in range(given.repeats):
            alone = seconds(searched, task, space, given.steps, few, 1)
            together = seconds(searched, task, space, given.steps, pack, pack)
            walls.append((alone[0] / few, together[0] / pack))
            cpus.append((alone[1] / few, together[1] / pack))
        ratio, of_cpu = (statistics.median(a / b for a, b in pairs) for pairs in (walls, cpus))
        one, packed = (statistics.median(column) for column in zip(*walls, strict=True))
        counts = []
        for trials, size in ((1, 1), (pack, pack)):
            with Counting() as counting:
                searched(task, space, given.steps, trials, size)
            counts.append(counting.operations / trials)
        print(
            f"{pack:4}  {pack:6}  {one:10.3f}  {packed:6.3f}  {ratio:24.2f}  {of_cpu:17.2f}  "
            f"{counts[0]:,.0f} / {counts[1]:,.0f} = {counts[0] / counts[1]:.1f}"
        )


if __name__ == "__main__":
    main()
