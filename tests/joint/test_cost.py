"""The unit of cost: counted, in proportion to the examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ift_tune.joint.cost import FORWARD, GRADIENT, HVP, Cost


def test_the_prices_are_those_of_the_design() -> None:
    assert (FORWARD, GRADIENT, HVP) == (1.0 / 3.0, 1.0, 2.0)


def test_one_pass_over_a_training_batch_is_one() -> None:
    cost = Cost(unit=32)
    cost.add(GRADIENT, 32)
    assert cost == Cost(unit=32, example_passes=32.0, hvps=0)
    assert cost.gradient_equivalents == 1.0


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.sampled_from([FORWARD, 1.0, HVP]), st.integers(0, 1000))),
)
def test_a_charge_is_in_proportion_to_its_examples(
    unit: int, charges: list[tuple[float, int]]
) -> None:
    cost = Cost(unit=unit)
    for passes, examples in charges:
        cost.add(passes, examples)
    expected = sum(passes * examples for passes, examples in charges) / unit
    assert cost.gradient_equivalents == pytest.approx(expected)
    assert cost.hvps == 0
