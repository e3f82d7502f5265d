"""The health columns of a step."""

from __future__ import annotations

import pytest

from ift_tune.joint.splits import val_test_gap


@pytest.mark.parametrize(
    ("metrics", "gap"),
    [
        ({"val_error": 0.1, "test_error": 0.4, "val_loss": 1.0, "test_loss": 9.0}, 0.3),
        ({"val_loss": 1.0, "test_loss": 9.0, "val_error": 0.0}, 8.0),
        ({"val_loss": 1.0, "test_error": 0.4}, None),
        ({}, None),
    ],
)
def test_the_gap_is_test_minus_validation(metrics: dict[str, float], gap: float | None) -> None:
    assert val_test_gap(metrics) == (None if gap is None else pytest.approx(gap))
