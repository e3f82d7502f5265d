"""Where a trial goes on: from its own checkpoints, whatever has become of Ray's experiment.

Ray's snapshots of an experiment are pickles, which run code when they are read, and are torn where
the driver was killed while they were copied. So none is restored: a new experiment takes the trials
up, and each begins with the latest of its checkpoints that is whole.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.errors import CheckpointError
from ift_tune.trial.record import TrialRecord

GOES_ON = "__goes_on"
"""Key of a Ray configuration: the checkpoint that a trial begins with; None: it begins afresh."""

CHECKPOINT = "checkpoint.pt"
"""File in each of the folders that Ray keeps for a checkpoint."""

RAY_NAME = "ray_trial"
"""File in a trial's record that holds Ray's name of it, in its latest experiment."""

_EXPERIMENT = "ray-"

_log = logging.getLogger(__name__)


class Resumption(NamedTuple):
    """What a trial goes on from.

    Attributes:
        checkpoint: The file.
        config: The flat `MetaConfig` that the trial had there, after whatever it has exploited.
        step: The outer step after which it was written.
    """

    checkpoint: Path
    config: dict[str, Any]
    step: int


def experiments(run: Path) -> list[Path]:
    """Return the folders of Ray's experiments in a run directory, the latest last."""
    numbered = [(_number(path), path) for path in run.glob(f"{_EXPERIMENT}*") if path.is_dir()]
    return [path for number, path in sorted(numbered) if number >= 0]


def next_experiment(run: Path) -> str:
    """Return the name of an experiment that is not there yet."""
    last = max((_number(path) for path in experiments(run)), default=-1)
    return f"{_EXPERIMENT}{last + 1}"


def latest_checkpoint(record: TrialRecord) -> Resumption | None:
    """Return what a trial goes on from: the latest checkpoint that is whole, with all its rows.

    What is damaged is named in a warning, and the one before is used.

    Args:
        record: The trial's, in its run directory.

    Returns:
        None if the trial begins again, of which it is told too where it had a checkpoint.

    Raises:
        UsageError: If the rows are damaged.
    """
    files = _checkpoints(record)
    rows = record.known_steps() if files else 0
    for index, file in enumerate(files):
        before = files[index + 1 : index + 2]
        rest = f"going on from {before[0]}" if before else "the trial begins again"
        try:
            state = load_checkpoint(file)
        except CheckpointError as error:
            _log.warning("%s; %s", error, rest)
            continue
        step = int(state["metrics"].get("step", 0))
        if step <= rows:
            return Resumption(file, state["config"], step)
        _log.warning(
            "%s has rows up to step %d of the %d that %s counts; %s",
            record.path / "steps.csv",
            rows,
            step,
            file,
            rest,
        )
    return None


def _checkpoints(record: TrialRecord) -> list[Path]:
    """Return a trial's checkpoints over all experiments, the latest first."""
    found: list[Path] = []
    names = [record.path.name]
    if (named := record.path / RAY_NAME).exists():
        names.append(named.read_text())  # as the folder was called before it was called like this
    for experiment in reversed(experiments(record.path.parent)):
        folders = [p for name in names for p in (experiment / name).glob("checkpoint_*")]
        latest_first = sorted(folders, key=_number, reverse=True)
        found += [folder / CHECKPOINT for folder in latest_first]
    return [file for file in found if file.is_file()]


def _number(path: Path) -> int:
    """Return the number at the end of a folder's name, -1 if there is none."""
    digits = path.name.replace("_", "-").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1
