"""What a comparison has found, computed from its two tables alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ift_tune.base.direction import Direction, default_metric
from ift_tune.base.errors import UsageError
from ift_tune.base.statistics import Array, Interval, interval, mean_ranks
from ift_tune.base.status import (
    COARSE_PREFIX,
    FAULT,
    FOUND_PREFIXES,
    HEALTH_COLUMNS,
    START_CHECK_COLUMNS,
    TrialStatus,
)
from ift_tune.compare.arms import ARMS
from ift_tune.compare.pairwise import (
    Against,
    Curve,
    Key,
    Trajectory,
    compare_with,
    grid,
    mean_curve,
    trajectory,
)
from ift_tune.trial.diagnoses import DIAGNOSES
from ift_tune.trial.tables import COST_COLUMNS, IDENTITY_COLUMNS, Results

NOTHING = (
    "no search has found anything yet: let it run on, or, if it is over, raise its budget, which "
    "did not pay for one step"
)
UNFINISHED = (TrialStatus.RUNNING.value, TrialStatus.INTERRUPTED.value)
"""Statuses of trials that do not count yet."""

REFERENCES = ("ift+val", "ift", "ift+tpe")
"""The arm that the others are compared with: the first of these that is there, else of all.

Said before anything is run, so that no result decides which of them the verdict is about."""

_NO_SETTING = {
    *IDENTITY_COLUMNS,
    *COST_COLUMNS,
    *HEALTH_COLUMNS,
    *START_CHECK_COLUMNS,
    DIAGNOSES,
    FAULT,
    "best_value",
    "best_step",
}
_VALUE_PREFIXES = ("val_", "search_", "test_", "retrained_")
_NO_SETTING_PREFIXES = ("train_", "val_", "search_", "test_", *FOUND_PREFIXES)


@dataclass(frozen=True)
class ArmFindings:
    """What one arm came to.

    Attributes:
        name: The arm.
        summary: What it does, in a line.
        seeds: Searches that found something.
        retrained: Test metric of the chosen hyperparameters after retraining from scratch.
        search: Search metric by which they were chosen.
        rank: Mean rank of `retrained` among the arms, over the seeds that all have; NaN if none.
        trials: Mean number of trials per search.
        cost: Largest cost of a search.
        seconds: Mean time of a search, over its trials.
        optimism: How much better the choice looked: mean of `retrained` minus `search`, or the
            other way round of a metric that is maximised.
        val_test_gap: Mean of test minus validation metric at the chosen moment, at its weights, or
            the other way round; NaN for arms that do not use the validation split.
        search_curve: `search` against cost; without a point if there is no common cost.
        retrained_curve: `retrained` against cost.
        gap_seeds: Seeds over which `val_test_gap` is the mean: those that have both.
    """

    name: str
    summary: str
    seeds: int
    retrained: Interval
    search: Interval
    rank: float
    trials: float
    cost: float
    seconds: float
    optimism: float
    val_test_gap: float
    search_curve: Curve
    retrained_curve: Curve
    gap_seeds: int = 0


class SearchedTrials(NamedTuple):
    """The trials of an arm that ran several for a seed, of all seeds.

    Attributes:
        measured: Its rows of `trials` that have a value, ordered by seed and trial.
        complete: Those that ran to their end: by which parameters are weighed.
        parameters: Columns of the settings that take more than one value in `measured`.
    """

    measured: pd.DataFrame
    complete: pd.DataFrame
    parameters: list[str]


@dataclass(frozen=True)
class Findings:
    """All that a comparison has found.

    Attributes:
        task: The task.
        metric: The search metric, as ``search_error``.
        measure: ``"error"``, ``"loss"``, ...
        cost: The column that the budget counts.
        limit: The budget of a search.
        about: What run.json and environment.json say.
        reference: The arm that the others are compared with.
        arms: In the order of the retrained test metric.
        against: The reference against each other arm, in that order.
        chosen: One row for each search: ``arm, seed, trial, step, search, retrained, cost, ...``.
        results: The tables that it was computed from: without trials that have not ended, and
            without values and steps of those that failed. Whatever is drawn or said reads these.
        direction: In which the metric is better.
    """

    task: str
    metric: str
    measure: str
    cost: str
    limit: float
    about: Mapping[str, Any]
    reference: str
    arms: list[ArmFindings]
    against: list[Against]
    chosen: pd.DataFrame
    results: Results
    direction: Direction = Direction.MIN

    def arm(self, name: str) -> ArmFindings:
        """Return an arm's findings by name."""
        return next(arm for arm in self.arms if arm.name == name)

    @cached_property
    def outer_steps(self) -> dict[str, pd.DataFrame]:
        """The rows of `steps` with a hypergradient, by arm; empty without IFT arms."""
        steps = self.results.steps
        if "solve_status" not in steps:
            return {}
        solved = steps[steps["solve_status"].notna()]
        names = [arm.name for arm in self.arms]
        return {name: own for name in names if len(own := solved[solved["arm"] == name])}

    @cached_property
    def searches(self) -> dict[str, SearchedTrials]:
        """The trials of the arms that ran several for a seed, by arm."""
        trials = self.results.trials.dropna(subset=["best_value"]).sort_values(["seed", "trial"])
        settings = setting_columns(trials)
        searches = {}
        for arm in self.arms:
            own = trials[trials["arm"] == arm.name]
            if own.groupby("seed").size().max() > 1:
                complete = own[own["status"] == TrialStatus.COMPLETE.value]
                varied = [column for column in settings if own[column].nunique() > 1]
                searches[arm.name] = SearchedTrials(own, complete, varied)
        return searches


def setting_columns(trials: pd.DataFrame) -> list[str]:
    """Return the columns that say what a trial was given: meta-hyperparameters, coarse parameters.

    They are told by what they are not: only PyTorch's side knows the settings of every inverse,
    and a report is made without it.
    """
    return [
        str(column)
        for column in trials
        if str(column).startswith(COARSE_PREFIX)
        or not (column in _NO_SETTING or str(column).startswith(_NO_SETTING_PREFIXES))
    ]


def find(results: Results) -> Findings:
    """Return what the tables of a comparison say; of an unfinished one, what they say so far.

    Args:
        results: From `load_results`.

    Raises:
        UsageError: If they are not of a comparison, or nothing is measured yet.
    """
    about = {str(key): value for key, value in results.trials.attrs.items()}
    run = about.get("run", {})
    if run.get("backend") != "compare":
        raise UsageError("these tables are not of a comparison: make one by ift-tune compare")
    if "best_value" not in results.trials:
        raise UsageError(NOTHING)
    results = Results(*(table.copy() for table in results))
    for table in results:
        table.attrs = {}  # pandas would copy them at every operation
        _drop_nonfinite(table)
    if results.steps.empty:
        raise UsageError(NOTHING)
    trials, steps = results = _judged(results)
    metric = run["metric"] or default_metric(trials.dropna(axis="columns", how="all"))
    direction = Direction.of_run(run)
    measure = metric.removeprefix("search_")
    counted = run["budget"]["gradient_equivalents"] is not None
    cost = "gradient_equivalents" if counted else "wall_seconds"
    limit = float(run["budget"]["gradient_equivalents" if counted else "seconds"])
    trajectories: dict[Key, Trajectory] = {}
    chosen: list[dict[str, Any]] = []
    for arm, seed in trials[["arm", "seed"]].drop_duplicates().itertuples(index=False):
        own, rows = (t[(t["arm"] == arm) & (t["seed"] == seed)] for t in (trials, steps))
        search = trajectory(own, rows, cost, f"retrained_test_{measure}", direction)
        choice = None if search is None else _choice(own, rows, search, measure, direction)
        if search is not None and choice is not None:
            trajectories[str(arm), int(seed)] = search
            chosen.append(choice)
    if not chosen:
        raise UsageError(NOTHING)
    table = pd.DataFrame(chosen)
    means = direction.sign * table.groupby("arm")["retrained"].mean()
    names = list(means.sort_values(kind="stable").index)
    ranks = _ranks(table, names, direction)
    at = grid(list(trajectories.values()), limit)
    # Not the best of the others: whom the data chooses, the data cannot be asked about.
    asked = [*REFERENCES, *run["extent"]["arms"], *names]
    reference = next(name for name in asked if name in names)
    return Findings(
        task=run["task"],
        metric=metric,
        measure=measure,
        cost=cost,
        limit=limit,
        about=about,
        reference=reference,
        arms=[
            _arm(
                name,
                table[table["arm"] == name],
                ranks.get(name, float("nan")),
                [own for key, own in trajectories.items() if key[0] == name],
                at,
                direction,
            )
            for name in names
        ],
        against=compare_with(
            reference, [n for n in names if n != reference], table, trajectories, direction
        ),
        chosen=table,
        results=results,
        direction=direction,
    )


def _judged(results: Results) -> Results:
    """Return what counts of the tables: of trials that have ended, and that have not failed.

    What failed has found nothing, and has been paid for all the same.
    """
    trials, steps = (table[~table["status"].isin(UNFINISHED)] for table in results)
    failed = trials["status"] == TrialStatus.FAILED.value
    return Results(
        trials.assign(best_value=trials["best_value"].mask(failed)),
        steps[steps["status"] != TrialStatus.FAILED.value],
    )


def _choice(
    trials: pd.DataFrame,
    steps: pd.DataFrame,
    search: Trajectory,
    measure: str,
    direction: Direction,
) -> dict[str, Any] | None:
    """Return what one search chose; None if that could not be retrained, or has not been yet."""
    best = direction.best_row(trials.dropna(subset=["best_value"]), "best_value")
    retrained = best.get(f"retrained_test_{measure}")
    if pd.isna(retrained):
        return None
    moment = steps[(steps["trial"] == best["trial"]) & (steps["step"] == best["best_step"])].iloc[0]
    return {
        "arm": best["arm"],
        "seed": int(best["seed"]),
        "trial": int(best["trial"]),
        "step": int(best["best_step"]),
        "search": float(best["best_value"]),
        "retrained": float(retrained),
        "test": float(moment.get(f"test_{measure}", np.nan)),
        "val": float(moment.get(f"val_{measure}", np.nan)),
        "trials": int(trials["best_value"].notna().sum()),
        "cost": search.total,
        "seconds": float(trials["wall_seconds"].sum()),
    }


def _drop_nonfinite(table: pd.DataFrame) -> None:
    """Leave empty what tables of other hands hold of infinite values, as of missing ones."""
    for column in table:
        if str(column) == "best_value" or str(column).startswith(_VALUE_PREFIXES):
            values = pd.to_numeric(table[column], errors="coerce").astype(float)
            table[column] = values.where(np.isfinite(values))


def _ranks(table: pd.DataFrame, names: list[str], direction: Direction) -> dict[str, float]:
    """Return mean ranks over the seeds that all arms have; none if there is no such seed."""
    wide = table.pivot(index="seed", columns="arm", values="retrained").reindex(columns=names)
    complete = wide.dropna()
    if complete.empty:
        return {}
    ranks = mean_ranks(direction.sign * complete.to_numpy(dtype=float))
    return dict(zip(names, ranks, strict=True))


def _arm(
    name: str,
    chosen: pd.DataFrame,
    rank: float,
    trajectories: Sequence[Trajectory],
    at: Array,
    direction: Direction,
) -> ArmFindings:
    gaps = direction.sign * (chosen["test"] - chosen["val"]).dropna()
    return ArmFindings(
        name=name,
        summary=ARMS[name].summary if name in ARMS else "",
        seeds=len(chosen),
        retrained=interval(chosen["retrained"].to_numpy(dtype=float)),
        search=interval(chosen["search"].to_numpy(dtype=float)),
        rank=rank,
        trials=float(chosen["trials"].mean()),
        cost=float(chosen["cost"].max()),
        seconds=float(chosen["seconds"].mean()),
        optimism=direction.sign * float((chosen["retrained"] - chosen["search"]).mean()),
        val_test_gap=float(gaps.mean()),
        search_curve=mean_curve(at, [(t.cost, t.search) for t in trajectories]),
        retrained_curve=mean_curve(at, [(t.retrained_cost, t.retrained) for t in trajectories]),
        gap_seeds=len(gaps),
    )
