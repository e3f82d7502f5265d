"""What a product may differ by from the difference quotient that it is held against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ift_tune.joint.tolerance import FURTHER, Tolerance

EPS = torch.finfo(torch.float32).eps
SCALES = [torch.tensor(1.0), torch.tensor(0.5)]
SLOPE = [torch.ones(3), torch.ones(2)]


def product(second: float = 1.0) -> list[Tensor]:
    return [torch.tensor([3.0, -1.0, 2.0]), torch.tensor([4.0, 2.0]) * second]


def test_the_tensor_that_is_off_is_told_with_its_error() -> None:
    tolerance = Tolerance(SCALES, EPS, 0.0)
    assert tolerance.wrong(product(), product(), SLOPE) == []
    assert tolerance.error == 0.0
    ((error, place),) = tolerance.wrong(product(), product(0.5), SLOPE)
    assert place == 1
    assert error == pytest.approx(0.5)
    assert tolerance.error == 0.0  # of what was allowed
    assert tolerance.wrong(product(), product(0.97), SLOPE) == []
    assert 0.0 < tolerance.error < 0.05


def test_units_that_have_left_their_piece_allow_more() -> None:
    tolerance = Tolerance(SCALES, EPS, 0.0)
    assert tolerance.wrong(product(), product(0.9), SLOPE)
    tolerance.loosen()
    assert not tolerance.wrong(product(), product(0.9), SLOPE)


def test_what_both_ways_disagree_about_is_not_held_against_a_product() -> None:
    tolerance = Tolerance(SCALES, EPS, 0.0)
    spoilt = product(2.0 * FURTHER)  # over the shorter way
    doubt = tolerance.doubt(spoilt, product(0.5))
    assert doubt[0] == 0.0
    assert doubt[1] > 0.0
    assert tolerance.wrong(product(), product(0.5), SLOPE)
    assert not tolerance.wrong(product(), product(0.5), SLOPE, doubt)


@pytest.mark.parametrize("rounding", [0.0, 1e-3])
def test_coarser_kernels_allow_more(rounding: float) -> None:
    tolerance = Tolerance(SCALES, EPS, rounding)
    assert tolerance.allows(1.0, 1.04, 0.0)
    assert tolerance.allows(1.0, 1.2, 0.0) is (rounding > 0.0)
    assert tolerance.allows(1.0, 1.2, 0.2)
    assert not tolerance.allows(float("nan"), 1.0, 0.0)
