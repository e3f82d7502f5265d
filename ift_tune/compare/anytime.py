"""What each search had found at each cost, and the mean of that over seeds: from the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from ift_tune.base.statistics import Array, band

POINTS = 80
"""Costs at which a mean over seeds is taken."""


@dataclass(frozen=True)
class Trajectory:
    """The incumbent of one search: the best that it had found, after each of its evaluations.

    Attributes:
        cost: Spent so far, of all its trials, shape (N,), increasing.
        search: The best value so far, shape (N,).
        retrained_cost: Costs at which the best so far was retrained, shape (M,).
        retrained: Test metric after retraining what was then the best, shape (M,).
        total: The whole cost.
    """

    cost: Array
    search: Array
    retrained_cost: Array
    retrained: Array
    total: float

    def first_reaching(self, value: float) -> float:
        """Return the cost at which the search value was first at or below `value`; NaN if never."""
        reached = self.search <= value
        return float(self.cost[reached.argmax()]) if reached.any() else float("nan")


class Curve(NamedTuple):
    """A mean over seeds with its bootstrap band, at the costs where every seed has a value."""

    cost: Array
    mean: Array
    low: Array
    high: Array


def trajectory(
    trials: pd.DataFrame, steps: pd.DataFrame, cost: str, retrained: str
) -> Trajectory | None:
    """Return the trajectory of the search whose rows are given, None if it evaluated nothing.

    Args:
        trials: Its rows of `trials`.
        steps: Its rows of `steps`.
        cost: The column of the cost.
        retrained: The column of the test metric after retraining.
    """
    totals = trials.sort_values("trial").set_index("trial")[cost].astype(float).fillna(0.0)
    before = totals.cumsum() - totals
    rows = steps.dropna(subset=["best_value"]).sort_values(["trial", "step"])
    if rows.empty:
        return None
    # Each trial counts its own cost from 0; a search has paid for those before it.
    costs = rows["trial"].map(before).astype(float) + rows[cost].astype(float)
    # What a trial measured at its end, after its last row, belongs to its whole cost.
    at_end = trials.dropna(subset=["best_value", retrained]).sort_values("trial")
    measured = pd.DataFrame(
        {
            "cost": [*costs, *(before[at_end["trial"]] + totals[at_end["trial"]])],
            "value": [*rows["best_value"], *at_end["best_value"]],
            "retrained": [*rows[retrained], *at_end[retrained]],
        },
        dtype=float,
    ).sort_values("cost", kind="stable")
    better = _improvements(measured.dropna())
    return Trajectory(
        cost=np.asarray(costs, dtype=np.float64),
        search=np.asarray(rows["best_value"].astype(float).cummin(), dtype=np.float64),
        retrained_cost=np.asarray(better["cost"], dtype=np.float64),
        retrained=np.asarray(better["retrained"], dtype=np.float64),
        total=float(totals.sum()),
    )


def _improvements(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose value is the lowest so far."""
    return measured[measured["value"] < measured["value"].cummin().shift(fill_value=np.inf)]


def grid(trajectories: Sequence[Trajectory], limit: float) -> Array:
    """Return costs, even in the logarithm, from where the first search has found something."""
    first = min(float(t.cost[0]) for t in trajectories)
    return np.geomspace(min(first, limit), limit, POINTS)


def sampled(at: Array, cost: Array, values: Array) -> Array:
    """Return the latest value at each cost, NaN before the first."""
    # A grid of logarithms meets a cost up to rounding only: a hair more, and it counts.
    index = np.searchsorted(cost, at * (1.0 + 1e-12), side="right") - 1
    return np.where(index >= 0, values[np.maximum(index, 0)], np.nan) if len(cost) else at * np.nan


def mean_curve(at: Array, lines: Sequence[tuple[Array, Array]]) -> Curve:
    """Return the mean of several searches' values with its band.

    Args:
        at: Costs.
        lines: Costs and values of each search.
    """
    values = np.array([sampled(at, cost, value) for cost, value in lines])
    # A mean over those that have found something would jump whenever one more has.
    everywhere = ~np.isnan(values).any(axis=0)
    at, values = at[everywhere], values[:, everywhere]
    mean = values.mean(axis=0)
    low, high = band(values) if len(values) > 1 and values.size else (mean, mean)
    return Curve(at, mean, low, high)
