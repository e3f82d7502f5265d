"""Whether a long search stays small: memory, open files and threads over many trials. Linux alone.

Many short trials run in this process, and some over Ray, whose driver and trial processes are
watched. After the first twenty, memory may move by 5 %, and files and threads not at all (but for
Ray's own, which come and go by a few). Memory that is free again, and that the allocator keeps for
later, is given back before this process is measured: the tables of a search grow with it, and what
was freed of smaller ones lies between. The exit status is 1 if something grew.

    python benchmarks/soak.py --trials 300 --ray-trials 60
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ift_tune.search.backends import prepare_ray

prepare_ray(local=True)

import pyarrow  # noqa: E402
import torch  # noqa: E402

from ift_tune import Budget, MetaConfig, MetaSpace, run_ray, run_study, tasks  # noqa: E402
from ift_tune.base.status import Outcome  # noqa: E402
from ift_tune.joint.callbacks import Callback  # noqa: E402
from ift_tune.search.space import Float  # noqa: E402
from ift_tune.search.work import quiet_optuna  # noqa: E402

TASK = tasks.get("diabetes-weight-decay")
SPACE = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
SETTLED = 20
LIBC = ctypes.CDLL(None)
PAGE = os.sysconf("SC_PAGE_SIZE")


class Size(NamedTuple):
    """What a process takes."""

    memory: float  # MiB
    files: int
    threads: int


def size_of(process: int | str = "self") -> Size:
    """Return what a process takes at this moment."""
    folder = Path("/proc", str(process))
    pages = int((folder / "statm").read_text().split()[1])
    counts = (len(list((folder / name).iterdir())) for name in ("fd", "task"))
    return Size(pages * PAGE / 2**20, *counts)


def give_back() -> None:
    """Let the system have what is free."""
    gc.collect()
    pyarrow.default_memory_pool().release_unused()
    if hasattr(LIBC, "malloc_trim"):  # glibc has it
        LIBC.malloc_trim(0)


def trial_processes() -> list[int]:
    """Return the processes in which this process's Ray runs trials."""
    parents: dict[int, int] = {}
    trials = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            stat = (folder / "stat").read_text()
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        if command.startswith(b"ray::") and b"Trainable" in command:
            trials.append(int(folder.name))
    return [process for process in trials if is_below(process, parents)]


def is_below(process: int, parents: Mapping[int, int]) -> bool:
    """Return whether this process has started another, or has started what did."""
    while process in parents and process != os.getpid():
        process = parents[process]
    return process == os.getpid()


class Watch(Callback):
    """Notes the sizes of this process, and of Ray's, after each trial."""

    def __init__(self, others: Callable[[], Sequence[int]] = tuple) -> None:
        self.sizes: list[Size] = []
        self.of_others: dict[int, list[Size]] = {}
        self._others = others

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Note them."""
        give_back()
        self.sizes.append(size_of())
        for process in self._others():
            try:
                self.of_others.setdefault(process, []).append(size_of(process))
            except OSError:
                continue


def is_steady(name: str, sizes: Sequence[Size], *, spare: int = 0) -> bool:
    """Print how sizes moved after the first trials, and return whether they may have.

    Args:
        name: Of the process.
        sizes: After each trial.
        spare: By how many its files and threads may move.
    """
    if len(sizes) <= SETTLED:
        print(f"{name}: {len(sizes)} trials are too few to say")
        return True
    first, later = sizes[SETTLED - 1], sizes[SETTLED:]
    memory = max(abs(size.memory / first.memory - 1.0) for size in later)
    files = max(abs(size.files - first.files) for size in later)
    threads = max(abs(size.threads - first.threads) for size in later)
    last = later[-1]
    print(
        f"{name}: {len(sizes)} trials; after {SETTLED} of them {first.memory:.1f} MiB, "
        f"{first.files} files, {first.threads} threads; at the end {last.memory:.1f} MiB, "
        f"{last.files}, {last.threads}; moved by at most {100 * memory:.1f} %, {files}, {threads}"
    )
    return memory <= 0.05 and files <= spare and threads <= spare


def settings(out: str, trials: int) -> dict[str, Any]:
    config: MetaConfig = TASK.default_config
    return {
        "n_trials": trials,
        "out": Path(out) / "run",
        "config": config.updated({"inner_steps": 2, "terms": 2}),
        "device": "cpu",
        "sampler": "random",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300, help="in this process")
    parser.add_argument("--ray-trials", type=int, default=60)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    quiet_optuna()
    budget = Budget(outer_steps=3, retrain=False)
    steady = []
    if chosen.trials:
        watch = Watch()
        with tempfile.TemporaryDirectory() as out:
            given = settings(out, chosen.trials)
            run_study(TASK.make_problem, SPACE, budget, callbacks=[watch], **given)
        steady.append(is_steady("in one process", watch.sizes))
    if chosen.ray_trials:
        watch = Watch(trial_processes)
        with tempfile.TemporaryDirectory() as out:
            given = settings(out, chosen.ray_trials)
            run_ray(TASK.make_problem, SPACE, budget, callbacks=[watch], **given)
        steady.append(is_steady("Ray's driver", watch.sizes, spare=4))
        for process, sizes in watch.of_others.items():
            steady.append(is_steady(f"Ray's trial process {process}", sizes, spare=4))
    sys.exit(0 if all(steady) else 1)


if __name__ == "__main__":
    main()
