"""`IFTObjective` in studies that a user made."""

from __future__ import annotations

import functools
import gc
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
from optuna.trial import TrialState
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    PruneAtSecondReport,
    make_faulty,
    make_nothing,
    make_quadratic,
    make_tiny,
)

from ift_tune import Budget, UsageError, load_results
from ift_tune.search.objective import IFTObjective
from ift_tune.search.space import Choice, Float, MetaSpace
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory

DIVERGING = MetaSpace({"alpha": Float(1e6, 1e7)})


@pytest.fixture(scope="module", autouse=True)
def collect_only_what_the_tests_made() -> Iterator[None]:
    """Spare the libraries from every trial's `gc.collect()`, most of a small trial's time."""
    gc.freeze()
    yield
    gc.unfreeze()


def objective(factory: ProblemFactory = make_tiny, **changes: Any) -> IFTObjective:
    space: MetaSpace = changes.pop("space", SPACE)
    budget: Budget = changes.pop("budget", BUDGET)
    settings: dict[str, Any] = {"config": CONFIG, "device": "cpu"}
    return IFTObjective(factory, space, budget, **(settings | changes))


def study_of(pruner: optuna.pruners.BasePruner | None = None, **changes: Any) -> optuna.Study:
    return optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=pruner or optuna.pruners.NopPruner(),
        **changes,
    )


def test_trials_are_complete_with_value_parameters_and_attributes() -> None:
    study = study_of()
    study.optimize(objective(), n_trials=3)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    for trial in study.trials:
        attributes = json.loads(json.dumps(trial.user_attrs))
        assert attributes["stop_reason"] == "done"
        assert attributes["metric"] == "search_error"
        assert trial.value == attributes["search_error"]
        assert {"test_error", "retrained_test_error", "gradient_equivalents"} <= set(attributes)
        assert set(trial.params) == set(SPACE.distributions)
        assert trial.distributions == SPACE.to_optuna()
    assert study.best_value == min(t.value for t in study.trials if t.value is not None)
    assert len(study.trials_dataframe()) == 3


@pytest.mark.parametrize(
    ("budget", "evaluated"),
    [(Budget(outer_steps=3), [1, 2, 3]), (Budget(outer_steps=5, eval_every=2), [2, 4, 5])],
)
def test_every_evaluation_is_reported(budget: Budget, evaluated: list[int]) -> None:
    study = study_of()
    study.optimize(objective(budget=budget), n_trials=1)
    (trial,) = study.trials
    assert list(trial.intermediate_values) == evaluated
    assert trial.intermediate_values[evaluated[-1]] == trial.value


@pytest.mark.parametrize(
    ("budget", "last"), [(Budget(outer_steps=9), 2), (Budget(outer_steps=9, eval_every=3), 6)]
)
def test_the_pruner_ends_a_trial(budget: Budget, last: int) -> None:
    study = study_of(PruneAtSecondReport())
    study.optimize(objective(budget=budget), n_trials=2)
    for trial in study.trials:
        assert trial.state is TrialState.PRUNED
        assert list(trial.intermediate_values) == [last // 2, last]
        assert trial.value == trial.intermediate_values[last]
        assert trial.user_attrs["stop_reason"] == "pruned"
        assert "retrained_test_error" not in trial.user_attrs


def test_a_diverging_series_is_pruned_and_never_nan() -> None:
    study = study_of()
    study.optimize(objective(space=DIVERGING, budget=Budget(outer_steps=20)), n_trials=2)
    for trial in study.trials:
        assert trial.state is TrialState.PRUNED
        assert trial.user_attrs["stop_reason"] == "diverged"
        assert all(map(math.isfinite, trial.intermediate_values.values()))


@pytest.mark.parametrize(("fault", "reason"), [("nan", "nonfinite"), ("oom", "oom")])
@pytest.mark.parametrize("after", [0, 6])
def test_a_trial_that_goes_wrong_is_pruned_and_the_study_goes_on(
    fault: str, reason: str, after: int
) -> None:
    study = study_of()
    factory = functools.partial(make_faulty, fault=fault, after=after)
    space = MetaSpace({"meta_lr": Float(0.01, 0.1)})
    study.optimize(objective(factory, space=space), n_trials=2)
    for trial in study.trials:
        assert trial.state is TrialState.PRUNED
        assert trial.user_attrs["stop_reason"] == reason
        assert list(trial.intermediate_values) == ([1, 2] if after else [])
        assert all(map(math.isfinite, trial.intermediate_values.values()))


def test_ask_and_tell() -> None:
    study = study_of()
    trial = study.ask()
    study.tell(trial, objective()(trial))
    assert study.trials[0].state is TrialState.COMPLETE
    asked = study.ask(fixed_distributions=SPACE.to_optuna())
    before = dict(asked.params)
    value = objective()(asked)
    assert asked.params == before
    assert isinstance(value, float)
    assert 0.0 <= value <= 1.0


def test_ask_and_tell_of_a_pruned_trial() -> None:
    study = study_of(PruneAtSecondReport())
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned, match="pruned"):
        objective()(trial)
    assert study.tell(trial, state=TrialState.PRUNED).state is TrialState.PRUNED


def test_an_enqueued_point_is_run_and_equal_points_give_equal_values() -> None:
    study = study_of()
    point = {"alpha": 0.2, "meta_lr": 0.1, "inner_steps": 2}
    study.enqueue_trial(point)
    study.enqueue_trial(point)
    study.optimize(objective(), n_trials=2)
    assert [t.params for t in study.trials] == [point, point]
    assert study.trials[0].value == study.trials[1].value


def test_a_categorical_choice_reaches_the_trial(tmp_path: Path) -> None:
    space = MetaSpace({"inverse": Choice(("identity", "conjugate_gradient"))})
    study = study_of()
    for name in ("identity", "conjugate_gradient"):
        study.enqueue_trial({"inverse": name})
    study.optimize(objective(space=space, run=RunDirectory(tmp_path)), n_trials=2)
    trials = load_results(tmp_path).trials
    assert list(trials["inverse"]) == ["identity", "conjugate_gradient"]
    assert trials["hvps"].iloc[0] == 0
    assert trials["hvps"].iloc[1] > 0


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_a_study_that_does_not_minimise_one_value_is_refused(
    directions: list[Literal["minimize", "maximize"]],
) -> None:
    study = optuna.create_study(directions=directions)
    with pytest.raises(UsageError, match="direction='minimize'"):
        study.optimize(objective(make_nothing), n_trials=1)


def test_a_space_with_a_bad_corner_is_refused_before_any_trial() -> None:
    with pytest.raises(UsageError, match="alpha"):
        objective(space=MetaSpace({"alpha": Float(0.0, 1.0)}))


def test_the_metric_can_be_chosen() -> None:
    study = study_of()
    study.optimize(objective(metric="search_loss"), n_trials=1)
    assert study.trials[0].value == study.trials[0].user_attrs["search_loss"]
    losses_only = study_of()
    losses_only.optimize(objective(make_quadratic), n_trials=1)
    assert losses_only.trials[0].user_attrs["metric"] == "search_loss"


def test_an_exception_of_the_problem_propagates_and_the_table_says_failed(tmp_path: Path) -> None:
    study = study_of()
    factory = functools.partial(make_faulty, fault="bug", after=6)
    space = MetaSpace({"meta_lr": Float(0.01, 0.1)})
    failing = objective(factory, space=space, run=RunDirectory(tmp_path))
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        study.optimize(failing, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.FAIL]
    trials, steps = load_results(tmp_path)
    assert list(trials["status"]) == list(trials["stop_reason"]) == ["failed"]
    assert list(steps["step"]) == [1, 2]
    study.optimize(failing, n_trials=1, catch=(RuntimeError,))
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 2


def test_a_study_in_sqlite_is_read_by_another_process_as_it_is(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = study_of(storage=url, study_name="mine")
    study.optimize(objective(), n_trials=2)
    loaded = optuna.load_study(study_name="mine", storage=url)
    assert [t.value for t in loaded.trials] == [t.value for t in study.trials]
    assert loaded.best_trial.user_attrs == study.best_trial.user_attrs


def test_the_objective_travels() -> None:
    copy = pickle.loads(pickle.dumps(objective()))
    first, second = study_of(), study_of()
    first.optimize(objective(), n_trials=1)
    second.optimize(copy, n_trials=1)
    assert first.trials[0].value == second.trials[0].value
    assert first.trials[0].params == second.trials[0].params
