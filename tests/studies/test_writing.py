"""Verdicts from intervals, and the t test behind them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ift_tune.base.statistics import LEVEL, student_interval
from ift_tune.studies.writing import Verdict, decided


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6, -0.9])
@pytest.mark.parametrize("comparisons", [1, 6])
def test_the_interval_excludes_zero_where_the_paired_t_test_is_significant(
    shift: float, comparisons: int
) -> None:
    values = np.random.default_rng(0).normal(shift, 0.5, size=9)
    found = student_interval(values, comparisons=comparisons)
    test = stats.ttest_1samp(values, 0.0)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(float(stats.sem(values)))
    significant = float(test.pvalue) * comparisons < LEVEL
    assert (found.low > 0.0 or found.high < 0.0) == significant
    interval = test.confidence_interval(1.0 - LEVEL / comparisons)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_one_value_decides_nothing() -> None:
    found = student_interval([3.0])
    assert (found.mean, found.error) == (3.0, math.inf)
    assert decided(found.low, found.high) is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.2, Verdict.CONFIRMED),
        (-0.2, -0.1, Verdict.CONTRADICTED),
        (-0.1, 0.1, Verdict.UNDECIDED),
        (0.0, 0.1, Verdict.UNDECIDED),
    ],
)
def test_an_interval_decides_unless_it_holds_zero(
    low: float, high: float, verdict: Verdict
) -> None:
    assert decided(low, high) is verdict
