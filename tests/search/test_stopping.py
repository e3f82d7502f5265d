"""Who may end a study before its number of trials, or put something into it, and where."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna import samplers
from optuna.trial import FrozenTrial, TrialState
from small_problems import (
    BUDGET,
    CONFIG,
    make_eventful,
    make_quadratic,
    make_tiny,
    raise_mistake,
)

from ift_tune import Budget, Choice, Float, Int, MetaSpace, UsageError, load_results, run_study
from ift_tune.base.errors import MissingDependencyError, WorkerError
from ift_tune.problem.problem import BilevelProblem
from ift_tune.search.result import StudyResult
from ift_tune.search.work import open_storage

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

COMPLETE, FAIL, PRUNED = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED
GRID = {"inner_steps": [1, 2], "terms": [0, 1, 2]}
SPACE = MetaSpace({"inner_steps": Int(1, 2), "terms": Choice((0, 1, 2))})
ALL_POINTS = Counter(itertools.product((1, 2), (0, 1, 2)))
MANY = 30


def study(out: Path, sampler: Any = "random", **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {"problem_factory": make_quadratic, "n_trials": MANY}
    settings |= {"budget": Budget(outer_steps=2, retrain=False), "device": "cpu", "config": CONFIG}
    return run_study(space=SPACE, out=out, sampler=sampler, **(settings | changes))


def states(result: StudyResult) -> list[TrialState]:
    return [trial.state for trial in result.study.trials]


def points(result: StudyResult) -> Counter[tuple[int, int]]:
    """Return how often each point was drawn, in trials that came to their end."""
    over = [trial for trial in result.study.trials if trial.state in (COMPLETE, PRUNED)]
    return Counter((t.params["inner_steps"], t.params["terms"]) for t in over)


def stop_at(number: int, study: optuna.Study, trial: FrozenTrial) -> None:
    if trial.number == number:
        study.stop()


class StopsAtThird(samplers.RandomSampler):
    """A sampler of one's own that ends its study after its third trial."""

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, *ending: Any) -> None:
        if trial.number == 2:
            study.stop()


STOPPERS: dict[str, dict[str, Any]] = {
    "a callback": {"callbacks": [functools.partial(stop_at, 2)]},
    "MaxTrialsCallback": {"callbacks": [optuna.study.MaxTrialsCallback(3)]},
    "MaxTrialsCallback of the pruned": {
        "callbacks": [optuna.study.MaxTrialsCallback(3, states=(PRUNED,))],
        "pruner": optuna.pruners.ThresholdPruner(upper=-1.0),
    },
    "a callback under Hyperband": {
        "callbacks": [functools.partial(stop_at, 2)],
        "pruner": "hyperband",
    },
    "a sampler": {"sampler": StopsAtThird(seed=0)},
    "a sampler under Hyperband": {"sampler": StopsAtThird(seed=0), "pruner": "hyperband"},
}


@pytest.mark.parametrize("changes", STOPPERS.values(), ids=STOPPERS)
def test_whoever_stops_a_study_ends_it_and_a_resumed_one_goes_on(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    result = study(tmp_path, **changes)
    assert len(result.study.trials) == len(result.trials) == 3
    resumed = study(tmp_path, resume=True, n_trials=5, **changes | {"callbacks": []})
    assert len(resumed.study.trials) == 5


def test_a_stopped_study_is_an_ordinary_one_afterwards(tmp_path: Path) -> None:
    result = study(tmp_path, "tpe", callbacks=[functools.partial(stop_at, 0)])
    with pytest.raises(RuntimeError, match=r"inside an objective function or a callback"):
        result.study.stop()
    stop = functools.partial(stop_at, 2)
    result.study.optimize(lambda trial: trial.number, n_trials=9, callbacks=[stop])
    assert len(result.study.trials) == 3


def test_workers_begin_no_trial_after_the_one_that_a_callback_stops_at(tmp_path: Path) -> None:
    called: list[int] = []

    def note(study: optuna.Study, trial: FrozenTrial) -> None:
        called.append(os.getpid())
        if len(called) == 2:
            study.stop()

    slow = functools.partial(make_eventful, pause=0.01)
    result = study(tmp_path, problem_factory=slow, budget=BUDGET, workers=2, callbacks=[note])
    assert set(called) == {os.getpid()}
    assert states(result) == [COMPLETE] * len(called)
    assert len(called) in (2, 3)  # the other worker was at a trial, or between two


@pytest.mark.parametrize(
    "make",
    [
        lambda: "grid",
        lambda: "bruteforce",
        lambda: samplers.GridSampler(GRID, seed=1),
        lambda: samplers.BruteForceSampler(seed=1, avoid_premature_stop=True),
    ],
    ids=["grid", "bruteforce", "a grid object", "a strict brute force object"],
)
def test_each_point_is_there_once_and_resuming_adds_none(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    sampler = make()
    result = study(tmp_path, sampler)
    assert points(result) == ALL_POINTS
    assert states(result) == [COMPLETE] * 6
    assert points(study(tmp_path, sampler, resume=True)) == ALL_POINTS
    assert len(load_results(tmp_path).trials) == 6


@pytest.mark.parametrize("sampler", ["grid", "bruteforce", "random"])
def test_steps_and_distributions_of_optuna_make_a_grid_and_are_enqueued(
    sampler: str, tmp_path: Path
) -> None:
    ranges: dict[str, Any] = {
        "meta_lr": Float(0.1, 0.3, step=0.1),
        "terms": optuna.distributions.IntDistribution(0, 4, step=2),
    }
    result = run_study(
        make_quadratic,
        MetaSpace(ranges),
        Budget(outer_steps=1, retrain=False),
        n_trials=9,
        out=tmp_path,
        sampler=sampler,
        enqueue=[{"terms": 2.0, "meta_lr": 0.1 + 0.2}] if sampler == "random" else [],
        device="cpu",
    )
    found = [(t.params["meta_lr"], t.params["terms"]) for t in result.study.trials]
    if sampler == "random":
        assert found[0] == (0.3, 2)
    else:
        assert sorted(found) == sorted(itertools.product((0.1, 0.2, 0.3), (0, 2, 4)))


@pytest.mark.parametrize("sampler", ["grid", "bruteforce"])
def test_workers_share_out_the_points(sampler: Any, tmp_path: Path) -> None:
    slow = functools.partial(make_eventful, pause=0.01)
    result = study(tmp_path, sampler, problem_factory=slow, budget=BUDGET, workers=2)
    assert points(result) == ALL_POINTS
    assert list(result.trials["status"]) == ["complete"] * 6


def test_a_larger_grid_goes_on_where_the_smaller_one_has_ended(tmp_path: Path) -> None:
    for terms in ([0, 1], [0, 1, 2]):
        grid = samplers.GridSampler({"inner_steps": [1, 2], "terms": terms})
        result = study(tmp_path, grid, resume=True)
    assert set(points(result)) == set(ALL_POINTS)
    assert len(result.study.trials) > 6  # Optuna takes another grid for another search


def test_an_enqueued_point_does_not_confuse_a_grid(tmp_path: Path) -> None:
    result = study(tmp_path, "grid", enqueue=[{"terms": 0, "inner_steps": 1}])
    assert set(points(result)) == set(ALL_POINTS)
    assert len(result.study.trials) == 7
    one = run_study(
        make_quadratic,
        MetaSpace({"terms": Int(1, 2)}),
        Budget(outer_steps=1),
        n_trials=9,
        out=tmp_path / "last",
        sampler=samplers.GridSampler({"terms": [1]}),
        enqueue=[{"terms": 2}],
        device="cpu",
    )
    assert [t.params["terms"] for t in one.study.trials] == [2, 1]


def test_points_are_enqueued_once_and_completed_by_the_sampler(tmp_path: Path) -> None:
    asked = [{"terms": 2}, {"inner_steps": 2, "terms": 0}]
    result = study(tmp_path, n_trials=1, enqueue=asked)
    assert result.study.trials[0].params["terms"] == 2
    assert [t.state for t in result.study.trials][1:] == [TrialState.WAITING]
    resumed = study(tmp_path, n_trials=3, enqueue=asked, resume=True)
    assert resumed.study.trials[1].params == asked[1]
    assert states(resumed) == [COMPLETE] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_enqueued_in_a_storage_of_ones_own_come_first(workers: int, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    mine = optuna.create_study(storage=url, study_name="mine")
    for terms in (2, 0):
        mine.enqueue_trial({"terms": terms, "inner_steps": 2})
    result = study(tmp_path / "run", n_trials=3, storage=url, study_name="mine", workers=workers)
    assert [t.params["terms"] for t in result.study.trials][:2] == [2, 0]
    assert states(result) == [COMPLETE] * 3
    assert mine.metric_names == ["search_loss"]


def test_no_trial_begins_when_the_time_is_up(tmp_path: Path) -> None:
    slow = functools.partial(make_eventful, pause=0.02)
    late = study(tmp_path, problem_factory=slow, budget=BUDGET, timeout=1e-9)
    assert late.study.trials == []
    assert late.failure is not None
    result = study(
        tmp_path, problem_factory=slow, budget=BUDGET, timeout=2.0, workers=2, resume=True
    )
    assert len(result.study.trials) < MANY
    assert set(states(result)) <= {COMPLETE}  # those at work come to their end


def make_half(config: Any, device: Any, seed: int) -> BilevelProblem:
    """Return a problem, or a mistake where there is one inner step."""
    if config.inner_steps == 1:
        raise_mistake()
    return make_tiny(config, device, seed)


@pytest.mark.parametrize("workers", [1, 2])
def test_exceptions_to_catch_fail_their_trial_and_count(workers: int, tmp_path: Path) -> None:
    called: list[TrialState] = []
    result = study(
        tmp_path,
        "grid",
        problem_factory=make_half,
        n_trials=6,
        catch=(KeyError, RuntimeError),
        callbacks=[lambda _, trial: called.append(trial.state)],
        workers=workers,
    )
    ends = {(t.params["inner_steps"], t.state) for t in result.study.trials}
    assert ends == {(1, FAIL), (2, COMPLETE)}
    assert Counter(called) == Counter(states(result)) == {COMPLETE: 3, FAIL: 3}
    assert Counter(result.trials["status"]) == {"complete": 3, "failed": 3}
    failed = next(t for t in result.study.trials if t.state is FAIL)
    assert failed.user_attrs["caught"] == "RuntimeError: a mistake in the user's problem"
    same = study(
        tmp_path, "grid", problem_factory=make_half, n_trials=6, catch=RuntimeError, resume=True
    )
    assert len(same.study.trials) == 6


@pytest.mark.parametrize(
    ("workers", "error"), [(1, RuntimeError), (2, WorkerError)], ids=["alone", "two"]
)
def test_other_exceptions_end_the_study_and_no_point_is_lost(
    workers: int, error: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match="a mistake in the user's problem"):
        study(tmp_path, "grid", problem_factory=make_half, catch=KeyError, workers=workers)
    assert "failed" in set(load_results(tmp_path).trials["status"])
    found = optuna.load_study(study_name=None, storage=open_storage(None, tmp_path))
    assert {trial.state for trial in found.trials} <= {COMPLETE, TrialState.RUNNING}
    mended = study(tmp_path, "grid", problem_factory=make_tiny, workers=workers, resume=True)
    assert points(mended) == ALL_POINTS
    assert list(mended.trials["status"]) == ["complete"] * 6


def needs_a_library(seed: int, trial_number: int) -> samplers.BaseSampler:
    raise ModuleNotFoundError("No module named 'cmaes'")


def refuses(seed: int, trial_number: int) -> samplers.BaseSampler:
    return samplers.GridSampler({"terms": [0, 1]})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (needs_a_library, ImportError, "cmaes"),
        (refuses, UsageError, "cannot draw from this space.*inner_steps, is not found in the"),
    ],
)
def test_a_sampler_that_cannot_suggest_is_named(
    make: Callable[..., Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        study(tmp_path / "run", make)
    if error is UsageError:
        assert not (tmp_path / "run").exists()
    assert issubclass(MissingDependencyError, ImportError)
