"""Statistics over seeds, all by SciPy: intervals, paired permutation tests, ranks.

Values have to be finite. A seed without a value is for the caller to leave out, and to count: with
NaN among the values a permutation test finds nothing as extreme as what was seen, and gives p = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ift_tune.base.errors import UsageError

LEVEL = 0.05
"""Of significance; intervals hold 1 − LEVEL."""

_RESAMPLES = 9999
_PAIRED_RESAMPLES = 2000  # each of which has to be ranked
_EXACT = 13  # pairs up to which all 2ⁿ ≤ _RESAMPLES sign changes are looked at
_SEED = 0  # a report that is made twice is the same
Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean with its bootstrap interval; the ends are NaN for a single value."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """How one arm differs from another over the same seeds.

    Attributes:
        difference: Mean of the differences with its interval.
        p: Of the two-sided paired permutation test of a mean of 0; 1 if there is no difference, or
            a single pair.
        effect: Cohen's d for pairs: mean over standard deviation of the differences; infinite if
            they are all the same and not 0.
        wins: Seeds with a difference above 0.
        pairs: Seeds.
    """

    difference: Interval
    p: float
    effect: float
    wins: int
    pairs: int


def interval(values: Sequence[float] | Array) -> Interval:
    """Return the mean with its percentile bootstrap interval (Efron 1979).

    With few values it is too narrow: about 82 % of such intervals over 5 normal values hold the
    true mean, 90 % over 10. What decides in a comparison is the permutation test.

    Raises:
        UsageError: If a value is not finite.
    """
    values = _finite("interval", values)
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    low, high = band(values[:, None])
    return Interval(mean, float(low[0]), float(high[0]))


def band(values: Array) -> tuple[Array, Array]:
    """Return the ends of the bootstrap intervals of the column means.

    Args:
        values: Shape (seeds, points); at least two seeds.

    Raises:
        UsageError: If a value is not finite.
    """
    values = _finite("band", values)
    # Percentile: BCa is not defined for values that are all the same, as errors of 0 may be. In
    # batches: all resamples of a curve at once would take gigabytes.
    bootstrap = stats.bootstrap(
        (values,),
        np.mean,
        axis=0,
        confidence_level=1.0 - LEVEL,
        n_resamples=_RESAMPLES,
        batch=max(1, 10**7 // values.size),
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    return bootstrap.confidence_interval.low, bootstrap.confidence_interval.high


def paired(differences: Sequence[float] | Array) -> Paired:
    """Return what the differences over seeds say.

    The test changes the signs of the differences, all 2ⁿ ways up to 13 pairs and 9,999 random
    ways beyond (Fisher 1935): it assumes only that without an effect either sign is as likely.

    Raises:
        UsageError: If a difference is not finite.
    """
    values = _finite("paired", differences)
    n = len(values)
    # One pair, or none that differs: each change of signs is as extreme as what was seen.
    if n < 2 or not values.any():
        p = 1.0
    else:
        p = float(
            stats.permutation_test(
                (values,),
                np.mean,
                permutation_type="samples",
                vectorized=True,
                n_resamples=np.inf if n <= _EXACT else _RESAMPLES,
                rng=np.random.default_rng(_SEED),
            ).pvalue
        )
    mean = float(values.mean()) if n else math.nan
    spread = float(values.std(ddof=1)) if n > 1 else math.nan
    if n > 1 and np.ptp(values) == 0.0:
        spread = 0.0  # and not its rounding, which would give an effect of 10¹⁵
    effect = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    return Paired(interval(values), p, effect, int((values > 0).sum()), n)


class StudentInterval(NamedTuple):
    """A mean with its standard error and its t interval, unbounded for a single value."""

    mean: float
    error: float
    low: float
    high: float


def student_interval(
    differences: Sequence[float] | Array, *, comparisons: int = 1
) -> StudentInterval:
    """Return the t interval of the mean difference: 0 outside is a significant paired t-test.

    Args:
        differences: One a seed.
        comparisons: How many this one was chosen from, for Bonferroni's correction.

    Raises:
        UsageError: If there is no difference, or one is not finite.
    """
    values = _finite("student_interval", differences)
    if not len(values):
        raise UsageError("student_interval takes at least one difference, got none")
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return StudentInterval(mean, math.inf, -math.inf, math.inf)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(1.0 - LEVEL / (2 * comparisons), n - 1)) * error
    return StudentInterval(mean, error, mean - reach, mean + reach)


class Relation(NamedTuple):
    """How numbers follow what was said of them, each with its bootstrap interval.

    Attributes:
        slope: Of the least-squares line of found by predicted numbers; 1 is the right size.
        r2: The squared correlation: the part of the found variance that the line explains.
        rank: Spearman's rank correlation: whether the order is right.
    """

    slope: Interval
    r2: Interval
    rank: Interval


def relation(predicted: Sequence[float] | Array, found: Sequence[float] | Array) -> Relation:
    """Return slope, R² and rank correlation with percentile bootstrap intervals over the pairs.

    All are NaN for fewer than three pairs, or where one side is all the same.

    Raises:
        UsageError: If a number is not finite.
    """
    x, y = _finite("relation", predicted), _finite("relation", found)
    n = len(x)
    if n < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        nothing = Interval(math.nan, math.nan, math.nan)
        return Relation(nothing, nothing, nothing)
    draws = np.random.default_rng(_SEED).integers(n, size=(_PAIRED_RESAMPLES, n))
    # Draws of a single pair, n times over, have no line.
    draws = draws[(np.ptp(x[draws], axis=1) > 0.0) & (np.ptp(y[draws], axis=1) > 0.0)]
    every = np.arange(n)[None, :]
    ends = 50.0 * LEVEL, 100.0 - 50.0 * LEVEL
    intervals = []
    here, drawn = _relations(x[every], y[every]), _relations(x[draws], y[draws])
    for value, values in zip(here, drawn, strict=True):
        low, high = np.percentile(values, ends)
        intervals.append(Interval(float(value[0]), float(low), float(high)))
    return Relation(*intervals)


def _relations(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Return slope, squared correlation and rank correlation of each row."""
    slope, correlation = _line(x, y)
    _, rank = _line(stats.rankdata(x, axis=1), stats.rankdata(y, axis=1))
    return slope, correlation**2, rank


def _line(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    xx, yy, xy = (x * x).sum(axis=1), (y * y).sum(axis=1), (x * y).sum(axis=1)
    return xy / xx, xy / np.sqrt(xx * yy)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm 1979), in the same order.

    Raises:
        UsageError: If one is not between 0 and 1.
    """
    wrong = [p for p in p_values if not 0.0 <= p <= 1.0]
    if wrong:
        raise UsageError(f"holm takes p-values from 0 to 1, got {wrong[0]}")
    adjusted = [0.0] * len(p_values)
    # Step down: the k-th smallest of m is multiplied by m − k + 1, and none may be adjusted below
    # a smaller one.
    running = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def least_p(pairs: int) -> float:
    """Return the smallest p that the paired test can give: all differences of one sign."""
    return min(1.0, 2.0 / 2.0**pairs)


def pairs_needed(comparisons: int) -> int:
    """Return how many pairs it takes for `comparisons` tests to be able to be significant."""
    # The least p, 2 / 2ⁿ, times the comparisons (Holm's first step) must reach the level.
    return math.ceil(math.log2(2.0 * max(1, comparisons) / LEVEL))


def mean_ranks(values: Array) -> list[float]:
    """Return each column's mean rank over the rows, 1 for the lowest, ties shared.

    Args:
        values: Shape (seeds, arms).

    Raises:
        UsageError: If a value is not finite.
    """
    values = _finite("mean_ranks", values)
    return [float(rank) for rank in stats.rankdata(values, axis=1).mean(axis=0)]


def _finite(function: str, values: Sequence[float] | Array) -> Array:
    """Return the values as an array, all of which are numbers.

    Raises:
        UsageError: If one is infinite or NaN.
    """
    array = np.asarray(values, dtype=float)
    if missing := int(np.count_nonzero(~np.isfinite(array))):
        raise UsageError(
            f"{function} takes finite numbers: leave out the seeds without one, and say how many "
            f"they are, got {missing} of {array.size} that are infinite or NaN"
        )
    return array
