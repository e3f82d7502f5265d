"""Slope, R² and rank correlation with bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ift_tune import UsageError
from ift_tune.base.statistics import relation


def test_the_estimates_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=40)
    y = 0.5 * x + 0.3 * generator.normal(size=40)
    found, line = relation(x, y), stats.linregress(x, y)
    assert found.slope.mean == pytest.approx(line.slope)
    assert found.r2.mean == pytest.approx(line.rvalue**2)
    assert found.rank.mean == pytest.approx(stats.spearmanr(x, y).statistic)
    for value in found:
        assert value.low < value.mean < value.high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(15):
        x = generator.normal(size=30)
        slope = relation(x, 2.0 * x + generator.normal(size=30)).slope
        held += slope.low <= 2.0 <= slope.high
    assert held >= 12


def test_without_a_line_nothing_is_known() -> None:
    for pair in (([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])):
        assert all(math.isnan(value.mean) and math.isnan(value.low) for value in relation(*pair))
    with pytest.raises(UsageError, match="finite"):
        relation([1.0, math.nan, 2.0], [1.0, 2.0, 3.0])
