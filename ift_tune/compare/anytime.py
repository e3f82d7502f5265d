"""What each search had found at each cost: from the tables alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
POINTS = 80


@dataclass(frozen=True)
class Trajectory:
    """The course of one search: what it had found, after each of its evaluations.

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


def trajectory(
    trials: pd.DataFrame, steps: pd.DataFrame, cost: str, retrained: str
) -> Trajectory | None:
    """Return the course of the search whose rows are given, None if it evaluated nothing.

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


def grid(trajectories: list[Trajectory], limit: float) -> Array:
    """Return costs, even in the logarithm, from where the first search has found something."""
    first = min(float(c.cost[0]) for c in trajectories)
    return np.geomspace(min(first, limit), limit, POINTS)


def sampled(at: Array, cost: Array, values: Array) -> Array:
    """Return the latest value at each cost, NaN before the first."""
    index = np.searchsorted(cost, at * (1.0 + 1e-12), side="right") - 1
    return np.where(index >= 0, values[np.maximum(index, 0)], np.nan) if len(cost) else at * np.nan
