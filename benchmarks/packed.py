"""Trials a minute with --pack against one by one, interleaved, and operations begun a trial.

    python benchmarks/packed.py --task digits-weight-decay --packs 4 16 64

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

from ift_tune import Budget, Float, Int, MetaConfig, MetaSpace, run_study, tasks

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


def seconds(*arguments: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    searched(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="digits-weight-decay")
    parser.add_argument("--packs", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=40, help="outer steps of a trial")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--varied", action="store_true", help="terms and inner steps vary too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task, space = tasks.get(given.task), VARIED if given.varied else SPACE
    seconds(task, space, 2, 2, 1)  # what is imported and compiled at the first use
    print(
        "pack  trials  one by one  packed  (wall s a trial)  ratio  ratio of CPU time  operations"
    )
    for pack in given.packs:
        few = min(pack, 8)
        walls: list[tuple[float, float]] = []
        cpus: list[tuple[float, float]] = []
        for _ in range(given.repeats):
            alone = seconds(task, space, given.steps, few, 1)
            together = seconds(task, space, given.steps, pack, pack)
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
