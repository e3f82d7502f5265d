"""The statistics against hand-computed values, full enumeration and laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ift_tune import UsageError
from ift_tune.base.statistics import (
    LEVEL,
    Array,
    band,
    holm,
    interval,
    least_p,
    mean_ranks,
    paired,
    pairs_needed,
    student_interval,
)

numbers = st.integers(-100, 100).map(lambda n: n / 8.0)  # whose sums are exact
samples = st.lists(numbers, min_size=2, max_size=6)


def enumerated(values: Sequence[float]) -> float:
    """Return the two-sided p over all 2ⁿ signs, counted in float64."""
    observed = abs(sum(values))
    as_extreme = 0
    for signs in itertools.product((1.0, -1.0), repeat=len(values)):
        total = abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        as_extreme += total >= observed - 1e-12 * max(1.0, observed)
    return float(as_extreme / 2.0 ** len(values))


# Holm


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04], [0.02, 0.04]),
        ([0.04, 0.01], [0.04, 0.02]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.03, 0.031, 0.9], [0.09, 0.09, 0.9]),  # never below a smaller one
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_is_between_p_and_bonferroni(
    p_values: list[float],
) -> None:
    adjusted = holm(p_values)
    n = len(p_values)
    for p, a in zip(p_values, adjusted, strict=True):
        assert p <= a <= min(1.0, n * p)
    for (p, a), (q, b) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert p != q or a == b
        assert not p < q or a <= b
    assert holm(p_values[::-1]) == adjusted[::-1]


# The permutation test


@pytest.mark.parametrize("n", range(3, 9))
@pytest.mark.parametrize("kind", ["normal", "shifted", "tied", "with zeros", "tiny"])
def test_p_is_exact(n: int, kind: str) -> None:
    values = np.random.default_rng(n).normal(size=n)
    if kind == "shifted":
        values += 1.5
    elif kind == "tied":
        values = np.round(values)
    elif kind == "with zeros":
        values[: n // 2] = 0.0
    elif kind == "tiny":
        values *= 1e-9
    scale = 1e9 if kind == "tiny" else 1.0
    assert paired(values).p == pytest.approx(enumerated(list(values * scale)), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12, 13])
def test_all_of_one_sign_is_the_least_p(n: int) -> None:
    values = np.linspace(0.1, 1.0, n)
    assert paired(values).p == pytest.approx(least_p(n))
    assert paired(-values).p == pytest.approx(least_p(n))


@pytest.mark.parametrize("n", [14, 40])
def test_many_pairs_are_sampled_and_seeded(n: int) -> None:
    values = np.random.default_rng(0).normal(0.4, 1.0, n)
    one = paired(values)
    assert one == paired(values)
    assert one.p >= 1.0 / 10_000
    z = abs(values.mean()) / values.std(ddof=1) * math.sqrt(n)
    assert one.p == pytest.approx(math.erfc(z / math.sqrt(2.0)), abs=0.05)


@pytest.mark.parametrize("value", [0.3, -2.0, 0.0])
def test_a_single_pair_shows_nothing(value: float) -> None:
    found = paired([value])
    assert (found.p, found.pairs, found.wins) == (1.0, 1, int(value > 0.0))
    assert found.difference.mean == value
    assert math.isnan(found.difference.low)


def test_no_pair_shows_nothing() -> None:
    found = paired([])
    assert (found.p, found.pairs, found.wins) == (1.0, 0, 0)
    assert math.isnan(found.difference.mean)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_no_difference(n: int) -> None:
    found = paired([0.0] * n)
    assert (found.p, found.effect, found.wins, found.pairs) == (1.0, 0.0, 0, n)
    assert tuple(found.difference) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 10])
@pytest.mark.parametrize("value", [0.1, -0.7, 1e-3, 0.25])
def test_all_differences_the_same(n: int, value: float) -> None:
    found = paired([value] * n)
    assert found.effect == math.copysign(math.inf, value)
    assert found.p == pytest.approx(least_p(n))
    assert tuple(found.difference) == pytest.approx((value,) * 3)


def test_the_effect_is_cohens_d() -> None:
    assert paired([1.0, 2.0, 3.0]).effect == pytest.approx(2.0)  # mean 2, deviation 1
    assert paired([-1.0, -2.0, -3.0]).effect == pytest.approx(-2.0)
    assert paired([1.0, 2.0, 3.0]).wins == 3
    assert paired([1.0, 0.0, -3.0]).wins == 1


@settings(max_examples=40, deadline=None)
@given(samples)
def test_laws_of_the_paired_test(values: list[float]) -> None:
    found = paired(values)
    assert least_p(len(values)) - 1e-12 <= found.p <= 1.0
    assert found.p == pytest.approx(enumerated(values), abs=1e-12)
    opposite = paired([-v for v in values])
    assert opposite.p == pytest.approx(found.p)
    assert opposite.difference.mean == -found.difference.mean
    assert opposite.wins + found.wins == sum(v != 0.0 for v in values)
    if math.isfinite(found.effect):
        assert opposite.effect == pytest.approx(-found.effect)
    assert paired(values[::-1]).p == pytest.approx(found.p)
    scaled = paired([4.0 * v for v in values])
    assert scaled.p == pytest.approx(found.p)
    assert scaled.difference.low == pytest.approx(4.0 * found.difference.low)
    low, high = found.difference.low, found.difference.high
    assert min(values) <= low <= found.difference.mean <= high <= max(values)


def test_under_the_null_p_is_below_the_level_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    below = sum(paired_p(generator.normal(size=7)) < LEVEL for _ in range(400))
    # Of 64 equally likely p-values of 7 pairs, 3 are below 0.05: 19 of 400, deviation 4.3.
    assert 4 <= below <= 36


def paired_p(values: Array) -> float:
    """Return p alone, by the same count of signs, which is quicker."""
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    totals = np.abs(signs @ values)
    return float((totals >= abs(values.sum()) - 1e-12).mean())


# Numbers of seeds


def test_five_seeds_are_never_enough() -> None:
    assert least_p(5) == 0.0625
    assert [least_p(n) for n in (0, 1, 2)] == [1.0, 1.0, 0.5]


def test_pairs_needed() -> None:
    assert pairs_needed(1) == 6
    assert [pairs_needed(m) for m in (0, 2, 3, 4, 8)] == [6, 7, 7, 8, 9]
    for comparisons in range(1, 30):
        needed = pairs_needed(comparisons)
        assert comparisons * least_p(needed) < LEVEL <= comparisons * least_p(needed - 1)


# Intervals


def test_an_interval_of_nothing_and_of_one() -> None:
    for values in ([], [1.5]):
        found = interval(values)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert interval([1.5]).mean == 1.5
    assert math.isnan(interval([]).mean)


def test_an_interval_of_equal_values_is_a_point() -> None:
    assert tuple(interval([0.5] * 4)) == (0.5, 0.5, 0.5)


def test_an_interval_is_the_same_each_time_and_about_as_wide_as_it_should_be() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 100)
    found = interval(values)
    assert found == interval(list(values))
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 10.0
    assert found.low == pytest.approx(found.mean - half, abs=0.03)
    assert found.high == pytest.approx(found.mean + half, abs=0.03)


def test_an_interval_of_two_values_reaches_both() -> None:
    assert tuple(interval([0.0, 1.0])) == (0.5, 0.0, 1.0)


def test_intervals_hold_the_mean_about_as_often_as_the_docstring_says() -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(150):
        found = interval(generator.normal(size=10))
        held += found.low <= 0.0 <= found.high
    assert 0.82 <= held / 150 <= 0.97  # 90 %, deviation 2.5 %


def test_a_band_is_an_interval_per_column() -> None:
    values = np.random.default_rng(0).normal(size=(6, 3))
    low, high = band(values)
    assert low.shape == high.shape == (3,)
    again = band(values)
    assert (low == again[0]).all()
    assert (high == again[1]).all()
    assert (low <= values.mean(axis=0)).all()
    assert (values.mean(axis=0) <= high).all()


def test_bands_do_not_touch_the_global_random_numbers() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    paired([1.0, 2.0, -0.5])
    assert np.random.random() == expected


# Ranks


def test_mean_ranks_share_ties() -> None:
    values = np.array([[0.1, 0.2, 0.3], [0.2, 0.2, 0.1], [0.5, 0.5, 0.5]])
    # 1 2 3; 2.5 2.5 1; 2 2 2
    assert mean_ranks(values) == pytest.approx([5.5 / 3, 6.5 / 3, 6.0 / 3])


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=5))
def test_mean_ranks_sum_to_the_same(rows: list[list[float]]) -> None:

    ranks = mean_ranks(np.array(rows))
    assert sum(ranks) == pytest.approx(6.0)
    assert all(1.0 <= rank <= 3.0 for rank in ranks)


# What is not a number


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_statistic_is_made_of_what_is_not_finite(wrong: float, place: int) -> None:
    values = [0.1, 0.2, 0.3]
    values[place] = wrong
    table = np.array(values)[:, None]
    for function in (paired, interval, student_interval):
        with pytest.raises(UsageError, match="got 1 of 3 that are infinite or NaN"):
            function(values)
    for of_table in (band, mean_ranks):
        with pytest.raises(UsageError, match="got 1 of 3 that are infinite or NaN"):
            of_table(table)
    with pytest.raises(UsageError, match="from 0 to 1"):
        holm(values)


def test_a_p_value_beyond_its_range_and_an_interval_of_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"from 0 to 1, got 1\.5"):
        holm([0.5, 1.5])
    with pytest.raises(UsageError, match="at least one difference"):
        student_interval([])
