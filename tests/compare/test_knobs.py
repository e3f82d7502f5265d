"""How a black-box arm sets the hyperparameters of a problem, and which values a grid takes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from ift_tune.compare.plain import turned
from torch import nn

from ift_tune.compare.arms.base import spread
from ift_tune.hyper import CoarseParameter


def test_a_module_of_the_users_own_is_left_alone() -> None:
    class Problem:
        hyper = nn.Linear(2, 2)

    problem: Any = Problem()
    turned({"decay": 1.0})(problem)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_grid_lies_inside_its_range_and_is_even_in_the_logarithm(size: int) -> None:
    knob = CoarseParameter(1e-6, 1.0, 1e-3)
    values = spread(knob, size)
    assert len(values) == size
    assert all(knob.low < value < knob.high for value in values)
    logs = [math.log10(value) for value in values]
    ends = [-6.0, *logs, 0.0]
    gaps = [b - a for a, b in itertools.pairwise(ends)]
    assert gaps[1:-1] == pytest.approx([6.0 / size] * (size - 1))
    assert (gaps[0], gaps[-1]) == pytest.approx((3.0 / size, 3.0 / size))
