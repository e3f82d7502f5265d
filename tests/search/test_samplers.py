"""Samplers: made for each trial from the study's seed and the trial's number."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from scipy.stats import qmc
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import UsageError
from ift_tune.search.per_trial import PerTrialSampler
from ift_tune.search.samplers import (
    SamplerFactory,
    as_sampler_factory,
    grid_factory,
    sampler_factory,
)
from ift_tune.search.sequences import SobolSampler
from ift_tune.search.study import run_study

NAMES = "abcd"
POINTS = 128


def a_study(make: SamplerFactory, seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=PerTrialSampler(make, seed))


def draw(study: optuna.Study, count: int) -> NDArray[np.float64]:
    """Return the points of trials in the unit cube; their ranges are logarithmic."""
    points = []
    for _ in range(count):
        trial = study.ask()
        values = [trial.suggest_float(name, 1e-3, 10.0, log=True) for name in NAMES]
        points.append([math.log(value / 1e-3) / math.log(1e4) for value in values])
        study.tell(trial, float(trial.number))
    return np.array(points)


def discrepancy(points: NDArray[np.float64]) -> float:
    return float(qmc.discrepancy(points, method="CD"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sobol_sequence_fills_the_space_as_evenly_as_scipys(seed: int) -> None:
    ours = discrepancy(draw(a_study(sampler_factory("qmc"), seed), POINTS))
    theirs = [discrepancy(qmc.Sobol(4, rng=rng).random(POINTS)) for rng in range(10)]
    random = discrepancy(draw(a_study(sampler_factory("random"), seed), POINTS))
    assert ours < 1.2 * max(theirs)
    assert ours < 0.1 * random


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sequence_sampler_of_the_users_keeps_its_sequence(seed: int) -> None:
    def make(seed: int, trial_number: int) -> BaseSampler:
        return optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)

    found = discrepancy(draw(a_study(make, seed), POINTS))
    assert found < 1.5 * discrepancy(qmc.Sobol(4, rng=seed).random(POINTS))


def test_sobol_points_depend_on_the_seed_and_on_the_trials_number_alone() -> None:
    whole = draw(a_study(sampler_factory("qmc")), 6)
    resumed = a_study(sampler_factory("qmc"))
    for number in range(6):  # as if each trial had a process of its own
        resumed.sampler = PerTrialSampler(sampler_factory("qmc"), 0)
        assert (draw(resumed, 1) == whole[number]).all()
    assert not (draw(a_study(sampler_factory("qmc"), 1), 6) == whole).any()


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (IntDistribution(1, 3), [1, 2, 3]),
        (IntDistribution(2, 10, step=4), [2, 6, 10]),
        (FloatDistribution(0.0, 1.0, step=0.5), [0.0, 0.5, 1.0]),
        (CategoricalDistribution(("x", None, 2)), ["x", None, 2]),
    ],
)
def test_all_values_are_equally_likely(distribution: BaseDistribution, values: list[Any]) -> None:
    sampler = SobolSampler(0)
    drawn = [sampler.value(number, 0, "x", distribution) for number in range(POINTS)]
    assert {type(value) for value in drawn} == {type(value) for value in values}
    for value in values:
        assert drawn.count(value) == pytest.approx(POINTS / 3, abs=1.0)
    assert set(drawn) == set(values)


@pytest.mark.parametrize(
    "distribution", [FloatDistribution(1e-6, 1.0, log=True), IntDistribution(1, 1000, log=True)]
)
def test_logarithmic_ranges_are_filled_evenly_in_the_logarithm(
    distribution: FloatDistribution | IntDistribution,
) -> None:
    drawn = [SobolSampler(3).value(n, 1, "x", distribution) for n in range(1024)]
    assert distribution.low <= min(drawn)
    assert max(drawn) <= distribution.high
    middle = math.sqrt(distribution.low * distribution.high)
    assert sum(value > middle for value in drawn) == pytest.approx(512, abs=80)


def test_a_grid_has_optunas_order_and_each_point_once() -> None:
    values = {"b": (1.0, 2.0, 3.0), "a": (4.0, 5.0)}
    theirs = optuna.samplers.GridSampler({k: list(v) for k, v in values.items()}, seed=7)
    found = []
    for sampler in (PerTrialSampler(grid_factory(values), 7), theirs):
        study = optuna.create_study(sampler=sampler)
        points = []
        for _ in range(6):
            trial = study.ask()
            points.append(tuple(trial.suggest_float(name, 0.0, 9.0) for name in "ba"))
            if sampler is not theirs:  # Optuna's ends its study at the end of its grid
                study.tell(trial, 0.0)
        found.append(points)
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


def test_a_factory_is_called_with_the_studys_seed_and_the_trials_number(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def make(seed: int, trial_number: int) -> BaseSampler:
        calls.append((seed, trial_number))
        return optuna.samplers.RandomSampler(seed=seed + trial_number)

    _run(tmp_path / "run", make, seed=7)
    assert calls == [(7, 0), (7, 1), (7, 2)]


def test_a_factory_of_one_argument_is_warned_of_and_gets_a_seed_for_each_trial(
    tmp_path: Path,
) -> None:
    seeds: list[int] = []

    def make(seed: int) -> BaseSampler:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with pytest.warns(DeprecationWarning, match=r"called with \(seed, trial_number\)"):
            _run(tmp_path / name, make, seed=seed)
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:6]
    assert set(seeds[:3]).isdisjoint(seeds[6:])
    by_name = a_study(sampler_factory("random"))
    with pytest.warns(DeprecationWarning, match="called with"):
        of_one_argument = a_study(as_sampler_factory(make))
    assert (draw(by_name, 3) == draw(of_one_argument, 3)).all()  # studies of before go on the same


@pytest.mark.parametrize("wrong", [lambda: None, lambda a, b, c: None, 3])
def test_what_makes_no_sampler_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"a function \(seed, trial_number\)"):
        as_sampler_factory(wrong)


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "cmaes", "qmc"])
def test_samplers_by_name_travel_and_repeat_themselves(name: str) -> None:
    make = pickle.loads(pickle.dumps(sampler_factory(name)))
    assert as_sampler_factory(make) is make
    assert (draw(a_study(make), 3) == draw(a_study(sampler_factory(name)), 3)).all()


def _run(out: Path, make: Any, seed: int) -> Sequence[optuna.trial.FrozenTrial]:
    return run_study(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=3,
        out=out,
        config=CONFIG,
        device="cpu",
        sampler=make,
        seed=seed,
    ).study.trials
