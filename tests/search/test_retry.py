"""Optuna's heartbeat: a dead process's trial is retried, and goes on from its checkpoint."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from processes import Running
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    comparable,
    kill_once,
    make_eventful,
    make_tiny,
)

from ift_tune import Callback, IFTObjective, MetaConfig, load_results, run_study
from ift_tune.search.result import StudyResult
from ift_tune.trial import runner
from ift_tune.trial.tables import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

FAIL, COMPLETE = TrialState.FAIL, TrialState.COMPLETE
POINT = {"alpha": 0.1, "meta_lr": 0.05, "inner_steps": 2}
GRACE = 2  # seconds without a heartbeat


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they are experimental
    RETRY = RetryHeartbeatStaleTrialCallback()
    NO_RETRY = RetryHeartbeatStaleTrialCallback(max_retry=0)


class Begun(Callback):
    """Keeps the step after which each trial goes on."""

    def __init__(self) -> None:
        self.after: list[tuple[int, int]] = []

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self.after.append((number, first_step))


class Death(BaseException):
    """As sudden as a kill: neither Optuna nor this package has a last word."""


def storage_in(folder: Path, retry: Any = RETRY) -> RDBStorage:
    return RDBStorage(
        f"sqlite:///{folder / 'study.db'}",
        heartbeat_interval=1,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=retry,
    )


def run(folder: Path, factory: Any = make_tiny, *, retry: Any = RETRY, **more: Any) -> StudyResult:
    settings: dict[str, Any] = {"config": CONFIG, "device": "cpu", "sampler": "random"}
    return run_study(
        factory,
        SPACE,
        BUDGET,
        n_trials=1,
        out=folder / "run",
        storage=storage_in(folder, retry),
        study_name="mine",
        enqueue=[POINT],
        **(settings | more),
    )


def objective(folder: Path, factory: Any = make_tiny, **more: Any) -> IFTObjective:
    place = RunDirectory(folder / "run", resume=True)
    return IFTObjective(factory, SPACE, BUDGET, config=CONFIG, device="cpu", run=place, **more)


def optimize(folder: Path, factory: Any, **more: Any) -> optuna.Study:
    study = optuna.create_study(storage=storage_in(folder), study_name="mine", load_if_exists=True)
    study.enqueue_trial(POINT, skip_if_exists=True)
    study.optimize(objective(folder, factory, **more), n_trials=1)
    return study


def deadly_once(folder: Path) -> Any:
    """Return a factory whose first problem kills its process, after a checkpoint of two steps."""
    event = functools.partial(kill_once, folder / "died")
    return functools.partial(
        make_eventful, event=event, meta_lr=POINT["meta_lr"], after=8, checkpoints=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenTrial, pd.DataFrame]:
    """The trial at the point, and its steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder, make_tiny).study.trials[0], comparable(load_results(folder / "run").steps)


def assert_went_on(
    folder: Path,
    trials: list[FrozenTrial],
    undisturbed: tuple[FrozenTrial, pd.DataFrame],
    *,
    number: int = 1,
) -> None:
    """Compare a retried trial with one that nobody disturbed; those before it have failed."""
    retried = trials[number]
    assert [t.state for t in trials] == [FAIL] * number + [COMPLETE]
    assert retried.system_attrs["failed_trial"] == 0
    assert retried.params == POINT
    assert retried.value == undisturbed[0].value
    assert retried.intermediate_values == undisturbed[0].intermediate_values
    tables = load_results(folder / "run")
    assert list(tables.trials["status"]) == ["failed"] * number + ["complete"]
    mine = comparable(tables.steps)
    assert set(mine["trial"]) == {number}  # the cost of a step is there once
    constants = ["trial", "run_id", "task", "arm"]
    columns = [c for c in undisturbed[1] if c not in constants and c in mine]
    pd.testing.assert_frame_equal(
        mine[columns].reset_index(drop=True), undisturbed[1][columns], check_exact=True
    )


@pytest.mark.parametrize("driver", [run, pytest.param(optimize, marks=pytest.mark.nightly)])
def test_the_trial_of_a_killed_process_is_retried_from_its_checkpoint(
    driver: Any, undisturbed: tuple[FrozenTrial, pd.DataFrame], tmp_path: Path
) -> None:
    factory = deadly_once(tmp_path)
    with Running(functools.partial(driver, tmp_path, factory)) as process:
        assert process.wait().status == -9
    dead = optuna.load_study(study_name="mine", storage=storage_in(tmp_path)).trials
    assert [t.state for t in dead] == [TrialState.RUNNING]
    time.sleep(GRACE + 1.5)
    begun = Begun()
    more = {"resume": True} if driver is run else {}
    found = driver(tmp_path, factory, callbacks=[begun], **more)
    assert begun.after == [(1, 2)]
    study = found.study if driver is run else found
    assert_went_on(tmp_path, study.trials, undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("retry", [NO_RETRY, None], ids=["exhausted", "none"])
def test_without_a_retry_the_trial_fails_or_goes_on_under_its_own_number(
    retry: Any, tmp_path: Path
) -> None:
    factory = deadly_once(tmp_path)
    with Running(functools.partial(run, tmp_path, factory, retry=retry)) as process:
        assert process.wait().status == -9
    time.sleep(GRACE + 1.5)
    begun = Begun()
    result = run(tmp_path, factory, retry=retry, resume=True, callbacks=[begun])
    states = [t.state for t in result.study.trials]
    if retry is None:
        assert (begun.after, states) == ([(0, 2)], [COMPLETE])
    else:
        assert (begun.after, states) == ([(1, 0)], [FAIL, COMPLETE])
        assert list(result.trials["status"]) == ["failed", "complete"]


def test_a_dead_worker_of_the_same_call_costs_no_retry(
    undisturbed: tuple[FrozenTrial, pd.DataFrame], tmp_path: Path
) -> None:
    begun = Begun()
    result = run(tmp_path, deadly_once(tmp_path), workers=2, callbacks=[begun])
    assert begun.after == [(0, 0), (0, 2)]
    assert [t.value for t in result.study.trials] == [undisturbed[0].value]


class Retried:
    """A study whose trials die in their second outer step, each queued again as by a heartbeat."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, inherit: bool) -> None:
        monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
        self.folder, self.deadly = folder, True
        self.study = optuna.create_study()
        self.study.enqueue_trial(POINT)
        self.retry = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=inherit)

    def event(self) -> None:
        if self.deadly:
            raise Death

    def run(self, **more: Any) -> None:
        factory = functools.partial(
            make_eventful, event=self.event, meta_lr=POINT["meta_lr"], after=5
        )
        self.study.optimize(objective(self.folder, factory, **more), n_trials=1)

    def die(self) -> None:
        with pytest.raises(Death):
            self.run()
        self.queue_again()

    def queue_again(self) -> None:
        number = self.study.trials[-1].number
        self.study.tell(number, state=FAIL)
        self.retry(self.study, self.study.trials[number])

    def go_on(self) -> list[tuple[int, int]]:
        begun, self.deadly = Begun(), False
        self.run(callbacks=[begun])
        return begun.after


@pytest.mark.parametrize("inherit", [False, True])
def test_a_retry_of_a_retry_goes_on_from_the_latest_checkpoint(
    inherit: bool,
    undisturbed: tuple[FrozenTrial, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retried = Retried(tmp_path, monkeypatch, inherit=inherit)
    retried.die()
    retried.die()
    retried.study.ask()  # and one that dies before it has begun
    retried.queue_again()
    assert retried.go_on() == [(3, 2)]
    trials = retried.study.trials
    assert list(load_results(tmp_path / "run").trials["trial"]) == [0, 1, 3]
    assert [t.state for t in trials] == [FAIL] * 3 + [COMPLETE]
    assert trials[3].value == undisturbed[0].value
    assert trials[3].intermediate_values == undisturbed[0].intermediate_values


def test_a_kill_while_the_folder_moves_costs_nothing(
    undisturbed: tuple[FrozenTrial, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retried = Retried(tmp_path, monkeypatch, inherit=False)
    retried.die()
    place = RunDirectory(tmp_path / "run", resume=True)
    place.trial(0).path.rename(place.trial(1).path)  # and killed
    assert retried.go_on() == [(1, 1)]
    assert_went_on(tmp_path, retried.study.trials, undisturbed)


def test_a_trial_that_died_before_its_first_checkpoint_begins_anew(
    undisturbed: tuple[FrozenTrial, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retried = Retried(tmp_path, monkeypatch, inherit=True)
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 1e9)
    retried.die()
    assert retried.go_on() == [(1, 0)]
    assert_went_on(tmp_path, retried.study.trials, undisturbed)


def test_what_another_run_directory_holds_is_out_of_reach_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    retried = Retried(tmp_path, monkeypatch, inherit=False)
    retried.die()
    retried.folder = tmp_path / "elsewhere"
    with caplog.at_level(logging.WARNING, "ift_tune"):
        assert retried.go_on() == [(1, 0)]
    assert "trial 1, a retry of trial 0, begins anew" in caplog.text
    assert (tmp_path / "run" / "trial-00000" / "checkpoint.pt").exists()
