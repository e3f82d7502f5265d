"""What each search had found at each cost, and the reference arm against each other one."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from ift_tune.base.direction import Direction
from ift_tune.base.statistics import LEVEL, Array, Interval, Paired, band, holm, paired

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
        direction: In which a value is better.
    """

    cost: Array
    search: Array
    retrained_cost: Array
    retrained: Array
    total: float
    direction: Direction = Direction.MIN

    def first_reaching(self, value: float) -> float:
        """Return the cost at which the search value was first as good as `value`; NaN if never."""
        reached = self.direction.sign * self.search <= self.direction.sign * value
        return float(self.cost[reached.argmax()]) if reached.any() else float("nan")


class Curve(NamedTuple):
    """A mean over seeds with its bootstrap band, at the costs where every seed has a value."""

    cost: Array
    mean: Array
    low: Array
    high: Array


def trajectory(
    trials: pd.DataFrame,
    steps: pd.DataFrame,
    cost: str,
    retrained: str,
    direction: Direction = Direction.MIN,
) -> Trajectory | None:
    """Return the trajectory of the search whose rows are given, None if it evaluated nothing.

    Args:
        trials: Its rows of `trials`.
        steps: Its rows of `steps`.
        cost: The column of the cost.
        retrained: The column of the test metric after retraining.
        direction: In which a value is better.
    """
    totals = trials.sort_values("trial").set_index("trial")[cost].astype(float).fillna(0.0)
    before = totals.cumsum() - totals
    rows = steps.dropna(subset=["best_value", cost]).sort_values(["trial", "step"])
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
    better = _improvements(measured.dropna(), direction)
    return Trajectory(
        cost=np.asarray(costs, dtype=np.float64),
        search=np.asarray(
            direction.best_so_far(rows["best_value"].astype(float)), dtype=np.float64
        ),
        retrained_cost=np.asarray(better["cost"], dtype=np.float64),
        retrained=np.asarray(better["retrained"], dtype=np.float64),
        total=float(totals.sum()),
        direction=direction,
    )


def _improvements(measured: pd.DataFrame, direction: Direction) -> pd.DataFrame:
    """Return the rows whose value is better than all before."""
    losses = direction.sign * measured["value"]
    return measured[losses < losses.cummin().shift(fill_value=np.inf)]


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


Key: TypeAlias = tuple[str, int]
"""Of a search: its arm and its seed."""


class Conclusion(enum.IntEnum):
    """What the comparison of the reference with another arm shows, from worse to better."""

    OTHER_BETTER = -1
    NO_EVIDENCE = 0
    REFERENCE_BETTER = 1


@dataclass(frozen=True)
class Reach:
    """How much cheaper the reference reaches what another arm found in the end.

    Attributes:
        ratio: Median over seeds of the other's cost over the reference's, a seed in which the
            reference does not reach it counting as 0; 0 if it fails in half of the seeds or more.
        reached: Seeds in which it reaches it.
        seeds: Seeds.
    """

    ratio: float
    reached: int
    seeds: int


@dataclass(frozen=True)
class Against:
    """The reference against another arm.

    Attributes:
        other: The other arm.
        ours: Mean retrained test metric of the reference over the common seeds.
        theirs: That of the other arm.
        test: Differences of it, with the sign that makes the reference better above 0.
        p_holm: Its p-value, adjusted for the number of comparisons.
        reach: Cost to reach the other's best search value.
        we_lack: Seeds in which only the other arm found something.
        they_lack: Seeds in which only the reference did.
        direction: In which the metric is better.
    """

    other: str
    ours: float
    theirs: float
    test: Paired
    p_holm: float
    reach: Reach
    we_lack: int = 0
    they_lack: int = 0
    direction: Direction = Direction.MIN

    @property
    def difference(self) -> Interval:
        """Mean of reference minus other with its interval."""
        d = self.test.difference
        if self.direction is Direction.MAX:
            return d
        # 0 − x and not −x: no minus sign before a zero.
        return Interval(0.0 - d.mean, 0.0 - d.high, 0.0 - d.low)

    @property
    def conclusion(self) -> Conclusion:
        """Which of the two arms is better, if there is evidence.

        Evidence takes a permutation test below `LEVEL` after Holm's correction, a bootstrap
        interval that is clear of 0, and something found in every seed in which the other arm
        found something.
        """
        low, high = self.test.difference.low, self.test.difference.high
        if self.p_holm >= LEVEL:
            return Conclusion.NO_EVIDENCE
        # An arm that fails on the hard seeds has a mean over the easy ones: that is no evidence.
        if low > 0.0 and not self.we_lack:
            return Conclusion.REFERENCE_BETTER
        if high < 0.0 and not self.they_lack:
            return Conclusion.OTHER_BETTER
        return Conclusion.NO_EVIDENCE


def compare_with(
    reference: str,
    others: Sequence[str],
    chosen: pd.DataFrame,
    trajectories: Mapping[Key, Trajectory],
    direction: Direction = Direction.MIN,
) -> list[Against]:
    """Return the reference against each other arm.

    Args:
        reference: Its name.
        others: The others' names.
        chosen: A row for each search that found something: ``arm``, ``seed``, ``retrained``.
        trajectories: Of those searches.
        direction: In which the metric is better.
    """
    wide = chosen.pivot(index="seed", columns="arm", values="retrained")
    common = [wide[[reference, other]].dropna() for other in others]
    tests = [
        paired(direction.sign * (c[o] - c[reference]).to_numpy(float))
        for o, c in zip(others, common, strict=True)
    ]
    adjusted = holm([test.p for test in tests])
    has = wide.notna()
    return [
        Against(
            other=other,
            ours=float(both[reference].mean()),
            theirs=float(both[other].mean()),
            test=test,
            p_holm=p,
            reach=_reach(trajectories, reference, other),
            we_lack=int((has[other] & ~has[reference]).sum()),
            they_lack=int((has[reference] & ~has[other]).sum()),
            direction=direction,
        )
        for other, both, test, p in zip(others, common, tests, adjusted, strict=True)
    ]


def _reach(trajectories: Mapping[Key, Trajectory], reference: str, other: str) -> Reach:
    """Return how much cheaper the reference reaches each seed's best of the other arm.

    By the search value, which both arms have at every evaluation; retrained values are too few.
    """
    seeds = [s for arm, s in trajectories if arm == other and (reference, s) in trajectories]
    ratios = []
    for seed in seeds:
        theirs = trajectories[other, seed]
        target = float(theirs.search[-1])
        # Infinitely dear where it is never reached: 0 times cheaper, and the median stays defined.
        own = trajectories[reference, seed].first_reaching(target)
        ratios.append(0.0 if np.isnan(own) else theirs.first_reaching(target) / own)
    reached = sum(ratio > 0.0 for ratio in ratios)
    # Where half of an even number fail, the median would be the mean of a 0 and of a ratio: half of
    # what no seed has.
    typical = float(np.median(ratios)) if 2 * reached > len(seeds) else 0.0
    return Reach(typical, reached, len(seeds))
