"""Two callbacks: every number of every trial to a logger, and a column of one's own in the tables.

    python examples/callback_logger.py               # 4 trials, about 10 seconds
    python examples/callback_logger.py --workers 2   # the same in two processes

With tensorboardX installed (``pip install tensorboardX tensorboard``) the logs are TensorBoard's:
``tensorboard --logdir runs/logged/logs``. Without, each trial has a CSV file there. Which hook runs
when, and in which process: docs/callbacks.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any, Protocol

import ift_tune
from ift_tune import Budget, Float, JointOptimizer, MetaConfig, MetaSpace
from ift_tune.base.status import Outcome


class Writer(Protocol):
    """What is needed of TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""

    def close(self) -> None:
        """Close the log."""


class CsvWriter:
    """Stands in for a ``SummaryWriter``: a line for each number."""

    def __init__(self, folder: str) -> None:
        """Open ``scalars.csv`` in a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = Path(folder, "scalars.csv").open("a", newline="")  # noqa: SIM115
        self._lines = csv.writer(self._file)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._lines.writerow([step, tag, value])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_writer(folder: str) -> Writer:
    """Return TensorBoard's writer where there is one."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return CsvWriter(folder)
    writer: Writer = SummaryWriter(folder)
    return writer


class TrialLogger(ift_tune.Callback):
    """Logs the rows of all trials. Its hooks run in this process, wherever the trials do."""

    def __init__(self, folder: Path) -> None:
        """Take where the logs go."""
        self.folder, self.rows = folder, 0
        self._writers: dict[int, Writer] = {}

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        """Open the trial's log."""
        self._writers[number] = open_writer(str(self.folder / f"trial-{number:05}"))

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Log what was measured in an outer step."""
        self.rows += 1
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writers[number].add_scalar(name, value, row["step"])

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Close it."""
        self._writers.pop(number).close()


class MedianDecay(ift_tune.Callback):
    """Adds a column to the tables. Its hook runs beside the trial, so it may look at λ itself."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Measure something more."""
        metrics["median_decay"] = joint.problem.summary()["median"]


def main() -> None:
    """Run a small study with both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-trials", type=int, default=4)
    parser.add_argument("--outer-steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/logged"))
    options = parser.parse_args()

    task = ift_tune.tasks.get("digits-weight-decay")
    logger = TrialLogger(options.out / "logs")
    _, _, steps = ift_tune.run_study(
        task.make_problem,
        MetaSpace({"meta_lr": Float(0.01, 0.3, log=True)}),
        Budget(outer_steps=options.outer_steps),
        n_trials=options.n_trials,
        out=options.out,
        task=task.name,
        config=task.default_config,
        workers=options.workers,
        callbacks=[logger, MedianDecay()],
    )
    assert logger.rows == len(steps)
    last = steps.groupby("trial")["median_decay"].last()
    print(last.to_string())
    print(f"logged: {logger.rows} outer steps of {len(last)} trials in {logger.folder}")


if __name__ == "__main__":  # the workers import this file
    main()
