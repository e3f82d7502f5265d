"""Ray Tune's domains as values of a space, and a space's steps in Ray Tune."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ray import tune

from ift_tune import Choice, Float, Int, MetaSpace, UsageError

DOMAINS: dict[str, tuple[Any, Int | Float | Choice]] = {
    "uniform": (tune.uniform(0.1, 0.9), Float(0.1, 0.9)),
    "loguniform": (tune.loguniform(1e-4, 1.0), Float(1e-4, 1.0, log=True)),
    "quniform": (tune.quniform(0.2, 1.0, 0.2), Float(0.2, 1.0, step=0.2)),
    "randint": (tune.randint(2, 6), Int(2, 5)),
    "lograndint": (tune.lograndint(1, 9), Int(1, 8, log=True)),
    "qrandint": (tune.qrandint(8, 32, 8), Int(8, 32, step=8)),
    "qrandint off the grid": (tune.qrandint(5, 35, 8), Int(8, 32, step=8)),
    "qrandint of 1": (tune.qrandint(1, 5, 1), Int(1, 4)),
    "choice": (tune.choice([1, "auto", 2.5]), Choice((1, "auto", 2.5))),
    "a bare domain": (tune.search.sample.Integer(0, 4), Int(0, 3)),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_domains_of_ray_are_taken_with_their_ends(name: str) -> None:
    """What is drawn from either is the same set of values."""
    domain, expected = DOMAINS[name]
    space = MetaSpace({"user.own": domain})
    (own,) = space.distributions.values()
    assert own == expected
    back = space.to_ray()["user.own"]
    random = np.random.RandomState(0)
    drawn = [
        domain.sample(size=600, random_state=random),
        back.sample(size=600, random_state=random),
    ]
    if isinstance(own, Float):
        for values in drawn:
            assert own.low - 1e-12 <= min(values) <= max(values) <= own.high + 1e-12
        if own.step is None:
            return
        drawn = [np.round(values, 9).tolist() for values in drawn]
    options = own.options if isinstance(own, Choice) else own.values()
    for values in drawn:
        assert set(values) == set(options)


@pytest.mark.parametrize(
    "own",
    [Int(5, 47, step=10), Float(0.05, 0.5, step=0.1), Int(-6, 6, step=3), Float(0, 1, step=0.5)],
)
def test_steps_reach_ray_wherever_they_begin(own: Int | Float) -> None:
    domain = MetaSpace({"user.own": own}).to_ray()["user.own"]
    drawn = domain.sample(size=400, random_state=np.random.RandomState(0))
    assert sorted(set(np.round(drawn, 9))) == pytest.approx(own.values())
    assert isinstance(drawn[0], int if isinstance(own, Int) else float)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (tune.randn(0.0, 1.0), "two ends, or be a choice"),
        (tune.sample_from(lambda config: 3), "two ends, or be a choice"),
        (tune.qlograndint(1, 64, 2), "logarithmic range must have no step"),
        (tune.qloguniform(0.1, 1.0, 0.1), "logarithmic range must have no step"),
        (tune.grid_search([1, 2]), "give a Choice"),
    ],
)
def test_domains_without_a_counterpart_are_refused(domain: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MetaSpace({"terms": domain})
