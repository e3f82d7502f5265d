"""Numbers, costs and paths as a reader sees them."""

from __future__ import annotations

import math

import pytest

from ift_tune.base.statistics import Interval
from ift_tune.compare.arms import ARMS
from ift_tune.compare.pairwise import Reach
from ift_tune.report.html import without_paths
from ift_tune.report.words import (
    arm_label,
    arm_style,
    format_amount,
    format_interval,
    format_mean,
    format_number,
    format_p_value,
    format_reach,
    format_share,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345678, "0.1235"), (-0.5, "−0.5"), (-0.0, "0"), (math.nan, "–"), (-math.inf, "−∞")],
)
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_amounts_intervals_and_shares() -> None:
    assert format_amount(12345.6) == "12,346"
    assert format_amount(0.40321) == "0.403"
    assert format_amount(math.nan) == "–"
    assert format_interval(Interval(1.0, 0.5, 1.5)) == "[0.5, 1.5]"
    assert format_interval(Interval(1.0, math.nan, math.nan)) == ""
    assert format_mean(Interval(1.0, 0.5, 1.5)) == "1 [0.5, 1.5]"
    assert format_mean(Interval(1.0, math.nan, math.nan)) == "1"
    assert [format_share(share) for share in (0.0, 0.001, 0.25, 1.0)] == [
        "0 %",
        "< 1 %",
        "25 %",
        "100 %",
    ]
    assert [format_p_value(p) for p in (0.0001, 0.031, 1.0)] == ["< 0.001", "0.031", "1"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Reach(3.2, 10, 10), "3.2 times cheaper (10 of 10 seeds)"),
        (Reach(0.25, 4, 4), "4 times dearer (4 of 4 seeds)"),
        (Reach(1.01, 1, 1), "as dear (1 of 1 seed)"),
        (Reach(2.0, 7, 10), "2 times cheaper; not reached in 3 of 10 seeds"),
        (Reach(0.0, 4, 10), "not reached in 6 of 10 seeds"),
        (Reach(0.0, 0, 0), "–"),
    ],
)
def test_cost_to_reach(found: Reach, text: str) -> None:
    assert format_reach(found) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/runs/one", "…/one"),
        ("/data", "…/data"),
        ("~/runs/one/", "…/one"),
        ("--out=/tmp/x y/run", "--out=…/run"),
        ("C:\\Users\\me\\run", "…/run"),
        ("'/home/me/a b'", "'…/a b'"),
        ("runs/one", "runs/one"),
        ("../one", "../one"),
        ("module:make", "module:make"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("ift,random", "ift,random"),
    ],
)
def test_absolute_paths_are_cut(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_every_arm_is_drawn_as_it_says_and_an_unknown_one_too() -> None:
    for name, arm in ARMS.items():
        drawn = arm_style(name)
        assert drawn == (arm.label, arm.style.color, arm.style.dashes, arm.style.marker)
    assert arm_label("my own") == "my own"
    assert arm_style("my own") == arm_style("my own")
    assert arm_style("my own").marker not in {arm.style.marker for arm in ARMS.values()}
