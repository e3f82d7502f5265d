"""Sampler objects: what a resumed study promises with Optuna's own, and with one's own."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna import samplers
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from small_problems import make_quadratic

from ift_tune import Budget, Callback, Choice, Float, Int, MetaConfig, MetaSpace, Neumann, run_study
from ift_tune.search.result import StudyResult
from ift_tune.search.sampler_objects import CopiedSampler, KeptSampler, from_object
from ift_tune.search.samplers import as_sampler_factory
from ift_tune.search.shared_study import SharedStudy

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

RANGES = MetaSpace(
    {"alpha": Float(1e-3, 1.0, log=True), "meta_lr": Float(1e-3, 0.3), "inner_steps": Int(1, 3)}
)
POINTS = MetaSpace({"terms": Int(0, 2), "inner_steps": Choice((1, 3))})
GRID = {"terms": [0, 1, 2], "inner_steps": [1, 3]}
N_TRIALS = 6
SAMPLE = ("tpe without a seed", "cmaes", "grid")

# Made anew for each study, as a program that is started again makes them.
SAMPLERS: dict[str, tuple[MetaSpace, Callable[[], samplers.BaseSampler]]] = {
    "tpe": (RANGES, lambda: samplers.TPESampler(seed=3, n_startup_trials=1)),
    "tpe without a seed": (RANGES, lambda: samplers.TPESampler(n_startup_trials=1)),
    "random": (RANGES, lambda: samplers.RandomSampler(seed=3)),
    "cmaes": (RANGES, lambda: samplers.CmaEsSampler(n_startup_trials=1, popsize=4)),
    "qmc": (RANGES, lambda: samplers.QMCSampler()),
    "scrambled qmc": (RANGES, lambda: samplers.QMCSampler(seed=3, scramble=True)),
    "nsgaii": (RANGES, lambda: samplers.NSGAIISampler(population_size=2, seed=3)),
    "nsgaiii": (RANGES, lambda: samplers.NSGAIIISampler(population_size=2, seed=3)),
    "gp": (RANGES, lambda: samplers.GPSampler(n_startup_trials=4, deterministic_objective=True)),
    "partly fixed": (
        RANGES,
        lambda: samplers.PartialFixedSampler(
            {"inner_steps": 2}, samplers.TPESampler(seed=3, n_startup_trials=1)
        ),
    ),
    "grid": (POINTS, lambda: samplers.GridSampler(GRID)),
    "brute force": (POINTS, lambda: samplers.BruteForceSampler(seed=3)),
}


def study(
    out: Path, sampler: Any, space: MetaSpace = RANGES, n_trials: int = N_TRIALS, **more: Any
) -> StudyResult:
    return run_study(
        make_quadratic,
        space,
        Budget(outer_steps=2, retrain=False),
        n_trials=n_trials,
        out=out,
        config=MetaConfig(inverse=Neumann(terms=1, alpha=0.1), inner_steps=1, start_check=False),
        device="cpu",
        sampler=sampler,
        **more,
    )


def points(result: StudyResult) -> list[dict[str, Any]]:
    return [trial.params for trial in result.study.trials]


class DieAtStep(Callback):
    def on_trial_step(self, number: int, row: Mapping[str, Any]) -> None:
        if (number, row["step"]) == (3, 1):
            raise KeyboardInterrupt


def die_when_told(_: optuna.Study, trial: FrozenTrial) -> None:
    if trial.number == 4:
        raise KeyboardInterrupt


def die_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = SharedStudy.new_trial

    def asked(self: SharedStudy, marks: Mapping[str, Any]) -> optuna.Trial:
        trial = ask(self, marks)
        if trial.number == 2:
            raise KeyboardInterrupt
        return trial

    monkeypatch.setattr(SharedStudy, "new_trial", asked)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.nightly) for n in SAMPLERS],
)
def test_a_study_killed_three_times_has_the_points_of_an_undisturbed_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, make = SAMPLERS[name]
    undisturbed = study(tmp_path / "undisturbed", make(), space)
    assert [t.state for t in undisturbed.study.trials] == [TrialState.COMPLETE] * N_TRIALS
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        die_when_asked(patch)
        with pytest.raises(KeyboardInterrupt):
            study(out, make(), space)
    for hook in (DieAtStep(), die_when_told):
        with pytest.raises(KeyboardInterrupt):
            study(out, make(), space, callbacks=[hook], resume=True)
    resumed = study(out, make(), space, resume=True)
    assert points(resumed) == points(undisturbed)
    assert [t.state for t in resumed.study.trials] == [TrialState.COMPLETE] * N_TRIALS


def test_every_sampler_of_optuna_is_walked() -> None:
    known = {getattr(samplers, name) for name in samplers.__all__}
    concrete = {k for k in known if isinstance(k, type) and not inspect.isabstract(k)}
    assert {type(make()) for _, make in SAMPLERS.values()} == concrete - {samplers.BaseSampler}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_serves_two_workers(name: str, tmp_path: Path) -> None:
    space, make = SAMPLERS[name]
    result = study(tmp_path / "run", make(), space, workers=2)
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * N_TRIALS
    drawn = [tuple(sorted(point.items())) for point in points(result)]
    if "nsga" not in name:  # a child may be its parent's copy
        assert len(set(drawn)) == N_TRIALS


@pytest.mark.parametrize("name", ["random", "qmc"])
def test_a_sampler_object_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    space, make = SAMPLERS[name]
    sampler = make()
    first = study(tmp_path / "first", sampler, space, 3)
    again = study(tmp_path / "again", sampler, space, 3)
    assert points(first) == points(again)


def test_seeds_of_the_sampler_and_of_the_study_both_count(tmp_path: Path) -> None:
    seeds = [(0, 0), (1, 0), (0, 1)]
    values = [
        point["meta_lr"]
        for own, seed in seeds
        for point in points(
            study(tmp_path / f"{own}-{seed}", samplers.RandomSampler(own), n_trials=2, seed=seed)
        )
    ]
    assert len(set(values)) == 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_copy_has_its_generators_in_common_where_the_sampler_has(name: str) -> None:
    make = from_object(SAMPLERS[name][1]())
    assert isinstance(make, CopiedSampler)
    assert pickle.loads(pickle.dumps(make)).identity == make.identity
    assert make(0, 1) is not make(0, 1)


def test_a_local_function_inside_a_sampler_is_no_hindrance_in_one_process(tmp_path: Path) -> None:
    called: list[int] = []

    def note(_: optuna.Study, trial: FrozenTrial, *ending: object) -> None:
        called.append(trial.number)

    study(tmp_path, samplers.NSGAIISampler(after_trial_strategy=note), n_trials=2)
    assert called == [0, 1]


class Mine(samplers.BaseSampler):
    """Remembers how many trials it has seen, and draws from a generator of each kind."""

    def __init__(self) -> None:
        self.seen = 0
        self.kinds: dict[str, Any] = {
            "state": np.random.RandomState(1),
            "generator": [np.random.default_rng(1)],
            "python": random.Random(1),
            "torch": (torch.Generator().manual_seed(1),),
        }

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any
    ) -> Any:
        if param_name == "inner_steps":
            return 1 + min(self.seen, 2)
        one, two = self.kinds["state"].uniform(), self.kinds["generator"][0].uniform()
        three = self.kinds["python"].random()
        four = torch.rand(1, generator=self.kinds["torch"][0]).item()
        share = (one + two + three + four) % 1.0
        return distribution.low + share * (distribution.high - distribution.low)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self.seen += 1


def test_a_sampler_of_ones_own_class_remembers_and_draws_by_the_trials_number(
    tmp_path: Path,
) -> None:
    sampler = Mine()
    undisturbed = points(study(tmp_path / "undisturbed", sampler, n_trials=4))
    assert sampler.seen == 4
    assert [point["inner_steps"] for point in undisturbed] == [1, 2, 3, 3]
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "run", Mine(), callbacks=[DieAtStep()])
    resumed = points(study(tmp_path / "run", Mine(), n_trials=4, resume=True))
    numbers = [(point["alpha"], point["meta_lr"]) for point in resumed]
    assert numbers == [(point["alpha"], point["meta_lr"]) for point in undisturbed]
    assert len(set(numbers)) == 4


def test_all_that_holds_a_sampler_of_ones_own_is_kept() -> None:
    mine = Mine()
    wrapped = samplers.PartialFixedSampler({"alpha": 0.1}, mine)
    for sampler in (mine, wrapped):
        make = as_sampler_factory(sampler)
        assert isinstance(make, KeptSampler)
        assert make(0, 1) is sampler
    before = copy.deepcopy(mine.kinds["python"]).random()
    as_sampler_factory(wrapped)(0, 2)
    assert mine.kinds["python"].random() != before
