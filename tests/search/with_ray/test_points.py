"""What Ray adds to a configuration, draws or multiplies, as a point of the space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_problems import BUDGET, CONFIG, make_tiny

from ift_tune import UsageError
from ift_tune.search.ray import IFTTrainable, ray_trainable
from ift_tune.search.ray.points import point_of
from ift_tune.search.ray.session import Session
from ift_tune.search.space import Choice, Float, Int, MetaSpace

SPACE = MetaSpace(
    {
        "terms": Int(1, 9),
        "alpha": Float(0.1, 1.0),
        "inner_steps": Choice((1, 3, 10)),
        "inverse": Choice(("identity", "neumann")),
    }
)


@pytest.mark.parametrize(
    ("given_value", "taken"),
    [
        ({"terms": np.float64(4.0)}, {"terms": 4}),
        ({"terms": np.int32(4)}, {"terms": 4}),
        ({"terms": 4.8}, {"terms": 5}),  # 4 times 1.2
        ({"terms": 1e9}, {"terms": 9}),
        ({"alpha": np.float32(2.5)}, {"alpha": 1.0}),
        ({"alpha": 0.08}, {"alpha": 0.1}),
        ({"inner_steps": 3.6}, {"inner_steps": 3}),  # of a tune.choice, which is multiplied too
        ({"inner_steps": 12}, {"inner_steps": 10}),
        ({"inverse": "neumann", "terms": 2}, {"inverse": "neumann", "terms": 2}),
        ({"meta_lr": 7.0, "trial": 5}, {"meta_lr": 7.0}),  # not in the space: whoever gave it
    ],
)
def test_values_are_plain_and_inside(given_value: dict[str, Any], taken: dict[str, Any]) -> None:
    point = point_of(given_value, SPACE)
    assert point.values == taken
    assert [type(value) for value in point.values.values()] == [type(v) for v in taken.values()]
    inside = all(given_value[key] == value for key, value in taken.items())
    assert bool(point.moved) is not inside


@given(st.floats(0.5, 1.5), st.integers(1, 9), st.floats(0.1, 1.0), st.sampled_from([1, 3, 10]))
def test_whatever_a_population_multiplies_stays_in_the_space(
    factor: float, terms: int, alpha: float, steps: int
) -> None:
    multiplied = {"terms": terms * factor, "alpha": alpha * factor, "inner_steps": steps * factor}
    values = point_of(multiplied, SPACE).values
    assert 1 <= values["terms"] <= 9
    assert isinstance(values["terms"], int)
    assert 0.1 <= values["alpha"] <= 1.0
    assert values["inner_steps"] in (1, 3, 10)


def test_what_rays_searchers_add_is_understood() -> None:
    point = point_of({"terms": 2, "__trial_index__": 3, "__of_the_next_version__": object()}, None)
    assert point.values == {"terms": 2}
    assert point.repeat == 3
    kind = ray_trainable(
        make_tiny, MetaSpace({"terms": Int(1, 9)}), BUDGET, config=CONFIG, seed=5, device="cpu"
    )
    trial: Any = kind(config={"terms": 2, "__trial_index__": 2})
    assert trial._session.trial.seed == 7
    trial.stop()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("batch_size", r"batch_size is not a meta-hyperparameter.*user\.NAME"),
        ("metalr", r"did you mean 'meta_lr'.*user\.NAME"),
        ("budgets", "did you mean 'budget'"),
        ("userwidth", r"config\.user\['NAME'\], got 'userwidth'"),
    ],
)
def test_a_key_that_nobody_knows_is_an_error_that_names_the_mend(key: str, message: str) -> None:
    common = {"problem_factory": make_tiny, "budget": BUDGET, "base_config": CONFIG}
    with pytest.raises(UsageError, match=message):
        IFTTrainable(config={**common, "device": "cpu", key: 1})


def test_a_value_outside_is_told_to_the_driver() -> None:
    kind = ray_trainable(make_tiny, SPACE, BUDGET, config=CONFIG, device="cpu")
    session: Session = kind(config={"alpha": 3.0})._session
    assert '"moved": ["alpha 3.0 as 1.0"]' in session.advance()["record"]
    session.close()
