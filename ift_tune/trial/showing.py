"""What the results of runs and searches say of themselves: the best trial, why trials ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ift_tune.base.cards import RUN_FILES, Card, Table, shown
from ift_tune.base.direction import Direction, default_metric
from ift_tune.base.objectives import FEASIBLE, PARETO, Objectives
from ift_tune.base.status import TrialStatus
from ift_tune.trial.diagnoses import DIAGNOSES, split

FIRST = 5
"""Trials that a card shows."""

_COST = "gradient_equivalents"


def card_of_tables(
    trials: pd.DataFrame,
    steps: pd.DataFrame,
    folder: Path | None,
    best: Mapping[str, Any] | None = None,
    failure: str | None = None,
) -> Card:
    """Return what a run, a search or a comparison comes to.

    Args:
        trials: Its table.
        steps: The other.
        folder: The run directory.
        best: The best trial, where a study knows it; default: that of the table.
        failure: Why there is no best trial.
    """
    run = trials.attrs.get("run") or {}
    name = run.get("task") or (trials["task"].iloc[0] if "task" in trials and len(trials) else "")
    what = {"compare": "Comparison", "single": "Run"}.get(str(run.get("backend")), "Search")
    title = f"{what} {name}: {_count(len(trials), 'trial')}{_endings(trials)}"
    lines = [] if failure is None else [failure]
    if what == "Comparison":
        lines.append("which arm is better, and how sure that is: ift_tune.write_report")
        return Card(title, lines, _by_arm(trials), folder, RUN_FILES)
    objectives = Objectives.of_run(run)
    metrics = [str(objectives.metric or default_metric(trials.dropna(axis=1, how="all")))]
    metrics += [str(name) for name in objectives.metrics[1:]]
    ranked = _ranked(trials, metrics, objectives)
    if best is None and len(ranked):
        first = ranked.iloc[0]
        best = {"trial": first["trial"], "value": _plain(first[metrics[0]])}
    if best is not None:
        words = objectives.direction.words
        lines.append(f"best: trial {best['trial']}, {metrics[0]} {shown(best['value'])} ({words})")
        said = trials.loc[trials["trial"] == best["trial"]].get(DIAGNOSES, ())
        lines += [f"beware: {sentence}" for entry in said for sentence in split(entry)]
    if objectives.several and PARETO in trials:
        front = _count(int(trials[PARETO].sum()), "trial")
        lines.append(f"Pareto front: {front} by {objectives.words}")
    rows = ranked if len(ranked) else trials
    if len(rows) > FIRST:
        which = "best trials" if len(ranked) else "first trials"
        lines.append(f"the {FIRST} {which}, of {_count(len(steps), 'outer step')} in all:")
    columns = ["trial", *metrics, *_varied(run), *_of_the_test(metrics[0]), _COST, "stop_reason"]
    return Card(title, lines, _first_rows(rows, columns), folder, RUN_FILES)


def _ranked(trials: pd.DataFrame, metrics: list[str], objectives: Objectives) -> pd.DataFrame:
    """Return the complete trials that keep all constraints, the best by the first metric first.

    That metric's column is then of each trial's best evaluation, by which it is judged.
    """
    if "status" not in trials or not set(metrics) <= set(trials.columns):
        return trials.head(0)
    if "best_value" in trials:
        trials = trials.assign(**{metrics[0]: trials["best_value"]})
    able = trials["status"] == TrialStatus.COMPLETE.value
    if FEASIBLE in trials:
        able &= trials[FEASIBLE].isin([True])
    ascending = [direction is Direction.MIN for direction in objectives.directions]
    complete = trials[able].dropna(subset=metrics)
    return complete.sort_values([*metrics, "trial"], ascending=[*ascending, True])


def _endings(trials: pd.DataFrame) -> str:
    """Return why trials have ended, or where they stand: " (10 done, 2 pruned)"."""
    if "status" not in trials or "stop_reason" not in trials:
        return ""
    words = trials["stop_reason"].where(trials["stop_reason"].notna(), trials["status"])
    counts = Counter(words.dropna())
    return f" ({', '.join(f'{n:,} {word}' for word, n in counts.most_common())})" if counts else ""


def _of_the_test(metric: str) -> list[str]:
    kind = metric.removeprefix("search_")
    return [f"test_{kind}", f"retrained_test_{kind}"]


def _varied(run: Mapping[str, Any]) -> list[str]:
    return list(run.get("space") or ())


def _first_rows(rows: pd.DataFrame, columns: list[str]) -> Table:
    known = [name for name in dict.fromkeys(columns) if name in rows and rows[name].notna().any()]
    first = rows.head(FIRST)[known].to_dict("records")
    return Table(known, [[_plain(row[name]) for name in known] for row in first])


def _by_arm(trials: pd.DataFrame) -> Table:
    """Return how many searches and trials each arm of a comparison has."""
    names = ["arm", "seeds", "trials", _COST]
    rows = [
        [arm, int(of_arm["seed"].nunique()), len(of_arm), float(of_arm[_COST].sum())]
        for arm, of_arm in trials.groupby("arm", sort=False)
    ]
    return Table(names, rows)


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if value is pd.NA else value


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"
