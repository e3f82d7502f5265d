"""The two result tables, `trials` and `steps`, put together from the folders of the trials.

This is done at every trial's end and by `load_results`, so a kill loses at most the outer step that
it interrupts, and several processes can write trials of one run. Reading makes no folder and needs
no PyTorch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ift_tune.base.errors import UsageError
from ift_tune.base.views import VIEWS_FILE, View, unpack
from ift_tune.trial.record import TrialRecord, records_in

IDENTITY_COLUMNS = ("run_id", "task", "arm", "seed", "trial", "step", "status", "stop_reason")
METRIC_COLUMNS = tuple(
    f"{split}_{kind}" for kind in ("loss", "error") for split in ("train", "val", "search", "test")
)
COST_COLUMNS = ("wall_seconds", "gradient_equivalents", "hvps", "peak_memory_bytes", "device")
INTEGER_COLUMNS = ("seed", "trial", "step", "hvps", "peak_memory_bytes", "donor")
TEXT_COLUMNS = (
    *("run_id", "task", "arm", "status", "stop_reason", "device", "solve_status"),
    "learned_words",
)
MEASURED_COLUMNS = ("wall_seconds", "peak_memory_bytes")
"""Columns that a second run with the same seed does not repeat; all others it does, on the CPU."""

_ABOUT = ("run", "environment")  # the JSON files that say what the tables are of

VIEWS = "views"
"""Attribute of the `trials` table: pictures of λ of the first trial that has some, as JSON."""


class Results(NamedTuple):
    """Both tables of a run."""

    trials: pd.DataFrame
    steps: pd.DataFrame


def load_results(path: str | os.PathLike[str]) -> Results:
    """Return the tables of a run, finished or not, whichever backend wrote it.

    Args:
        path: The run directory.

    Returns:
        ``(trials, steps)``, also as attributes. `steps` has a row per outer step with its trial's
        constants repeated, `trials` the last of each.

    Raises:
        UsageError: If the directory holds no run.

    Example:
        >>> from ift_tune import Budget, load_results, testing
        >>> from ift_tune.trial.single import run_single
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> outcome = run_single(problem, Budget(outer_steps=3), out="runs/mine", device="cpu")
        >>> trials, steps = load_results("runs/mine")
        >>> trials[["trial", "step", "status", "stop_reason"]].to_dict("records")
        [{'trial': 0, 'step': 3, 'status': 'complete', 'stop_reason': 'done'}]
        >>> len(steps)
        3
    """
    path = Path(path)
    if any((record.path / "trial.json").exists() for record in records_in(path)):
        return assemble(path)
    if all((path / f"{name}.parquet").exists() for name in Results._fields):
        return Results(*(pd.read_parquet(path / f"{name}.parquet") for name in Results._fields))
    raise UsageError(f"{path} holds no run: no trial-*/ and no trials.parquet with steps.parquet")


def load_views(path: str | os.PathLike[str]) -> dict[str, list[View]]:
    """Return the pictures of λ, as data, of every finished trial of a run that has some.

    Args:
        path: The run directory.

    Returns:
        The views by the name of the trial's folder; where only the tables are left, those that
        they hold.

    Raises:
        UsageError: If the directory holds no run.
    """
    records = records_in(Path(path))
    if not records:
        return {"": unpack(load_results(path).trials.attrs.get(VIEWS, "[]"))}
    files = {record.path.name: record.path / VIEWS_FILE for record in records}
    return {name: unpack(file.read_bytes()) for name, file in files.items() if file.exists()}


def assemble(path: Path) -> Results:
    """Return both tables; their ``attrs`` hold what run.json and environment.json say.

    Parquet keeps the attributes, so that the tables alone tell what they are of.
    """
    records = records_in(path)
    results = _stack(records)
    for name in _ABOUT:
        about = path / f"{name}.json"
        if about.exists():
            for table in results:
                table.attrs[name] = json.loads(about.read_bytes())
    packed = (record.path / VIEWS_FILE for record in records)
    if (first := next((file for file in packed if file.exists()), None)) is not None:
        results.trials.attrs[VIEWS] = first.read_text()
    return results


def _stack(records: Sequence[TrialRecord]) -> Results:
    trials, steps = [], []
    for record in records:
        facts = record.facts()
        if not facts:
            continue
        table = record.steps()
        last: dict[Any, Any] = table.ffill().iloc[-1].to_dict() if len(table) else {}
        if len(table):
            constants = {key: value for key, value in facts.items() if key not in table.columns}
            steps.append(pd.DataFrame({**table, **constants}, index=table.index))
        trials.append(pd.DataFrame([{**last, **facts}]))
    return Results(_ordered(trials), _ordered(steps))


def _ordered(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Stack tables, with the fixed columns first and in their order, each column of one type."""
    known = [*IDENTITY_COLUMNS, *METRIC_COLUMNS, "retrained_test_error", *COST_COLUMNS]
    extra = list(dict.fromkeys(key for part in parts for key in part if key not in known))
    # Columns without a value would decide the type of the whole column when they are stacked.
    filled = [part.dropna(axis="columns", how="all") for part in parts]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()
    table = table.reindex(columns=[*known, *extra])
    for column in table:
        if column in INTEGER_COLUMNS:
            table[column] = pd.to_numeric(table[column]).astype("Int64")
        elif table[column].isna().all():
            table[column] = table[column].astype(object if column in TEXT_COLUMNS else float)
    return table
