"""Steps, numbers of any library, and Optuna's distributions as values of a space."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ift_tune import Budget, MetaConfig, MetaSpace, Neumann, UsageError
from ift_tune.search.distributions import Choice, Float, Int, as_distribution

STEPPED = MetaSpace(
    {
        "user.width": Int(16, 100, step=16),
        "inner_lr": Float(0.05, 0.42, step=0.1),
        "meta_lr": Float(0.1, 0.7, step=0.1),
    }
)


@given(st.integers(-50, 50), st.integers(0, 60), st.integers(1, 13))
def test_whole_steps_are_optuna_s(low: int, width: int, step: int) -> None:
    d = Int(low, low + width, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the upper end is moved
        theirs = IntDistribution(low, low + width, step=step)
    assert (d.low, d.high, d.step or 1) == (theirs.low, theirs.high, theirs.step)
    assert d.values()[0] == low
    assert d.values()[-1] == d.high
    assert all(theirs._contains(value) for value in d.values())


@given(st.integers(-30, 30), st.integers(0, 40), st.sampled_from([0.1, 0.25, 0.03, 2.0]))
def test_real_steps_are_optuna_s(low: int, steps: int, step: float) -> None:
    start = low / 10
    d = Float(start, start + (steps + 0.5) * step, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = FloatDistribution(start, start + (steps + 0.5) * step, step=step)
    assert d.high == pytest.approx(theirs.high, abs=1e-12)
    assert len(d.values()) == steps + 1
    assert all(theirs._contains(value) for value in d.values())


def test_a_space_with_steps_suggests_what_its_distributions_say() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def study() -> optuna.Study:
        return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))

    ours, theirs = study(), study()
    seen: dict[str, set[Any]] = {key: set() for key in STEPPED.distributions}
    for _ in range(60):
        trial = ours.ask()
        point = STEPPED.suggest(trial)
        assert point == theirs.ask(fixed_distributions=STEPPED.to_optuna()).params
        assert trial.distributions == STEPPED.to_optuna()
        for key, value in point.items():
            seen[key].add(value)
    assert seen["user.width"] == {16, 32, 48, 64, 80, 96}
    assert sorted(seen["inner_lr"]) == pytest.approx([0.05, 0.15, 0.25, 0.35])
    STEPPED.check(MetaConfig())


def test_moved_values_are_on_the_steps() -> None:
    """As population based training multiplies them."""
    moved = STEPPED.clipped({"user.width": 57.6, "inner_lr": 0.31, "meta_lr": 0.24})
    assert moved == {"user.width": 64, "inner_lr": pytest.approx(0.35), "meta_lr": 0.2}
    assert type(moved["user.width"]) is int
    plain = MetaSpace({"meta_lr": Float(0, 1)})  # whole ends do not make whole numbers
    assert plain.clipped({"meta_lr": 0.37}) == {"meta_lr": 0.37}


def test_spaces_without_steps_have_the_identity_that_they_had() -> None:
    space = MetaSpace({"terms": Int(0, 5), "meta_lr": Float(0.1, 1.0, log=True)})
    assert json.dumps(space.to_json()) == (
        '{"terms": {"kind": "Int", "low": 0, "high": 5, "log": false}, '
        '"meta_lr": {"kind": "Float", "low": 0.1, "high": 1.0, "log": true}}'
    )
    assert MetaSpace({"terms": Int(0, 5, step=1)}) == MetaSpace({"terms": Int(0, 5)})
    stepped = MetaSpace({"terms": Int(0, 5, step=5)}).to_json()
    assert stepped["terms"]["step"] == 5
    assert stepped != space.to_json()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (FloatDistribution(0.1, 1.0), Float(0.1, 1.0)),
        (FloatDistribution(1e-3, 1.0, log=True), Float(1e-3, 1.0, log=True)),
        (FloatDistribution(0.0, 0.9, step=0.3), Float(0.0, 1.0, step=0.3)),
        (IntDistribution(1, 9), Int(1, 9)),
        (IntDistribution(1, 9, log=True), Int(1, 9, log=True)),
        (IntDistribution(0, 8, step=4), Int(0, 10, step=4)),
        (
            CategoricalDistribution((1, 2.5, "auto", None, True)),
            Choice((1, 2.5, "auto", None, True)),
        ),
        (Int(2.0, np.int64(8)), Int(2, 8)),  # type: ignore[arg-type]
        (Float(np.float32(0.5), torch.tensor(1.5)), Float(0.5, 1.5)),  # type: ignore[arg-type]
        (Choice(np.array([1, 2])), Choice((1, 2))),  # type: ignore[arg-type]
    ],
)
def test_optuna_s_distributions_are_taken(given: Any, expected: Any) -> None:
    space = MetaSpace({"user.own": given})
    assert space.distributions == {"user.own": expected}
    assert space.to_json() == MetaSpace({"user.own": expected}).to_json()
    if isinstance(given, optuna.distributions.BaseDistribution):
        assert space.to_optuna()["user.own"] == given


def test_optuna_s_old_distributions_are_taken_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = optuna.distributions.DiscreteUniformDistribution(0.0, 1.0, 0.25)
        logs = optuna.distributions.IntLogUniformDistribution(1, 8)
    assert as_distribution("x", old) == Float(0.0, 1.0, step=0.25)
    assert as_distribution("x", logs) == Int(1, 8, log=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Int(1, 8, log=True, step=2), "logarithmic range must have no step"),
        (lambda: Float(0.1, 1.0, log=True, step=0.1), "logarithmic range must have no step"),
        (lambda: Int(0, 8, step=0), "step of a range must be a number above 0, got 0"),
        (lambda: Float(0.0, 8.0, step=-1.0), "above 0, got -1.0"),
        (lambda: Int(0, 8, step=1.5), "whole number to another, got 1.5"),  # type: ignore[arg-type]
        (lambda: Float(0.0, 1.0, step=float("nan")), "above 0, got nan"),
        (lambda: MetaSpace({"terms": {"grid_search": [1, 2]}}), 'sampler="grid"'),  # type: ignore[dict-item]
        (lambda: MetaSpace({"terms": (0, 20)}), "or one of Optuna's or Ray Tune's, got"),  # type: ignore[dict-item]
        (lambda: MetaSpace({"terms": np.arange(3)}), "or one of Optuna's or Ray Tune's"),  # type: ignore[dict-item]
        (lambda: MetaSpace.parse({"terms": "0:20:x"}), "LOW:HIGH:STEP"),
        (lambda: MetaSpace.parse({"terms": "0:20:true"}), "LOW:HIGH:STEP"),
    ],
)
def test_what_is_no_distribution_is_refused(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


def test_numbers_of_any_library_are_numbers_everywhere() -> None:
    user: Any = {"width": np.int64(64), "deep": np.True_, "rate": np.float32(0.5), "n": "x"}
    config = MetaConfig(
        inverse=Neumann(terms=3.0, alpha=np.float64(0.5)),  # type: ignore[arg-type]
        inner_steps=np.float64(7.0),  # type: ignore[arg-type]
        accumulate=torch.tensor(2),  # type: ignore[arg-type]
        warm_start=np.True_,  # type: ignore[arg-type]
        clip_norm=np.int8(1),  # type: ignore[arg-type]
        user=user,
    )
    assert config == MetaConfig(
        inverse=Neumann(terms=3, alpha=0.5),
        inner_steps=7,
        accumulate=2,
        warm_start=True,
        clip_norm=1,
        user={"width": 64, "deep": True, "rate": 0.5, "n": "x"},
    )
    json.dumps(config.to_flat())
    assert type(config.inner_steps) is int
    assert type(config.user["width"]) is int
    assert type(config.user["deep"]) is bool
    flat = {"terms": 3.0, "inner_steps": np.float64(7), "user.width": np.int16(64)}
    assert MetaConfig.from_flat(flat).to_flat()["user.width"] == 64
    budget = Budget(outer_steps=5.0, eval_every=np.int64(2))  # type: ignore[arg-type]
    assert budget == Budget(outer_steps=5, eval_every=2)
    assert type(budget.outer_steps) is int


def test_a_space_is_made_without_optuna_and_ray() -> None:
    code = (
        "import sys; import ift_tune; ift_tune.MetaSpace({'terms': ift_tune.Int(0, 5, step=5)});"
        "print({'optuna', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
