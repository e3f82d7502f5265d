"""The command line's search with Ray: the tables of any other backend, and an exact total."""

from __future__ import annotations

import functools
import gc
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import ray
import torch
from callback_probes import Display, Probe, check_hooks
from optuna.trial import TrialState
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    assert_same_tensors,
    comparable,
    kill_once,
    make_faulty,
    make_nothing,
    make_quadratic,
    make_tiny,
    raise_usage_error,
)

from ift_tune import Budget, MetaConfig, UsageError, load_results
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.errors import Interrupted, RunExistsError, WorkerError
from ift_tune.base.status import Outcome
from ift_tune.joint.callbacks import Callback
from ift_tune.search.ray import RayResult, run_ray
from ift_tune.search.ray import settings as schedulers
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.space import Choice, Float, MetaSpace
from ift_tune.search.study import run_study
from ift_tune.testing.problems import Quadratic
from ift_tune.trial.best import find_best
from with_ray.ray_problems import make_eventful_at

RATE = MetaSpace({"meta_lr": Choice((0.05,))})


def common(space: MetaSpace = SPACE, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "space": space,
        "budget": BUDGET,
        "config": CONFIG,
        "task": "tiny",
        "arm": "ift+random",
        "device": "cpu",
        "sampler": sampler_factory("random"),
    }
    return settings | changes


def search(out: Path, n_trials: int, factory: Any = make_tiny, **changes: Any) -> RayResult:
    """Run one trial at a time, in one process."""
    settings = {"cpus_per_trial": 2.0} | common(**changes)
    return run_ray(factory, n_trials=n_trials, out=out, **settings)


class Recorder(Callback):
    """Writes down what it is told, and does something at a step of a trial."""

    def __init__(self, at: tuple[int, int] = (-1, 0), action: Callable[[], object] = int) -> None:
        self.announcements: list[str] = []
        self.heard: list[Any] = []
        self._at, self._action = at, action

    def on_resources(self, text: str) -> None:
        self.announcements.append(text)

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self.heard.append((number, "started", first_step))

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self.heard.append((number, row["step"]))
        if (number, row["step"]) == self._at:
            self._action()

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        self.heard.append((number, outcome.stop_reason.value, outcome.value))


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


class Three:
    """Three trials with Ray, and the same three without."""

    def __init__(self, path: Path) -> None:
        self.path, self.other = path / "ray", path / "optuna"
        self.notes, self.recorder, self.display = path / "notes", Recorder(), Display()
        callbacks = [self.recorder, Probe(self.notes), self.display]
        self.result = search(self.path, 3, callbacks=callbacks, cpus_per_trial=1.0)
        probe = Probe(path / "other notes")
        self.other_result = run_study(
            make_tiny, n_trials=3, out=self.other, **common(callbacks=[probe])
        )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Three:
    return Three(tmp_path_factory.mktemp("three"))


def assert_same_search(one: Path, other: Path) -> None:
    """Compare both tables, but for what names the backend and what a probe adds."""
    own = ["run_id", "ten_steps"]
    for tables in zip(load_results(one), load_results(other), strict=True):
        mine, theirs = (comparable(table).drop(columns=own, errors="ignore") for table in tables)
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


def test_the_tables_are_those_of_the_same_search_without_ray(three: Three) -> None:
    assert_same_search(three.path, three.other)
    assert set(load_results(three.path).trials["run_id"]) != set(
        load_results(three.other).trials["run_id"]
    )


def test_the_result_is_what_load_results_finds(three: Three) -> None:
    trials, steps = load_results(three.path)
    pd.testing.assert_frame_equal(three.result.trials, trials)
    pd.testing.assert_frame_equal(three.result.steps, steps)
    assert len(pd.read_parquet(three.path / "steps.parquet")) == len(steps) == 12


def test_the_study_is_complete_and_that_of_the_search_without_ray(three: Three) -> None:
    assert three.result.study is not None
    mine, theirs = three.result.study.trials, three.other_result.study.trials
    assert [t.state for t in mine] == [TrialState.COMPLETE] * 3
    assert [t.params for t in mine] == [t.params for t in theirs]
    assert [t.value for t in mine] == [t.value for t in theirs]
    assert [t.intermediate_values for t in mine] == [t.intermediate_values for t in theirs]
    attributes = set(theirs[0].user_attrs) - {"worker"}
    assert attributes <= set(mine[0].user_attrs)
    assert three.result.best is not None
    assert three.result.best["value"] == min(t.value for t in mine if t.value is not None)


def test_lambda_as_found_is_kept(three: Three) -> None:
    for number in range(3):
        name = f"trial-{number:05d}/hyperparameters.pt"
        mine, theirs = (load_checkpoint(path / name) for path in (three.path, three.other))
        assert list(mine) == list(theirs)
        assert_same_tensors(list(mine.values()), list(theirs.values()))


def test_callbacks_hear_of_every_step(three: Three) -> None:
    assert len(three.recorder.announcements) == 1
    assert three.recorder.announcements[0].endswith("a trial takes 1 CPUs and 0 GPUs: 2 at a time")
    for number, value in enumerate(three.result.trials["search_error"]):
        heard = [what[1:] for what in three.recorder.heard if what[0] == number]
        assert heard == [("started", 0), (1,), (2,), (3,), (4,), ("done", value)]


def test_each_hook_runs_once_where_it_belongs(three: Three) -> None:
    check_hooks(three.notes, three.result.steps, apart=True, resources=1)
    assert three.display.rows == 12


def test_a_search_that_is_complete_is_not_run_again(three: Three) -> None:
    again = search(three.path, 3, make_nothing, resume=True)
    pd.testing.assert_frame_equal(again.trials, three.result.trials)


def test_an_existing_directory_is_refused(three: Three) -> None:
    with pytest.raises(RunExistsError, match="--resume"):
        search(three.path, 4, make_nothing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "another seed;"),
        ({"scheduler": "asha"}, "another scheduler;"),
        ({"budget": Budget(outer_steps=5)}, "another budget;"),
        ({"n_trials": 0}, "n_trials must be an integer of at least 1"),
        ({"scheduler": "ashas"}, "unknown scheduler 'ashas'; did you mean 'asha'"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    changes: dict[str, Any], message: str, three: Three
) -> None:
    with pytest.raises(UsageError, match=message):
        search(three.path, changes.pop("n_trials", 4), make_nothing, resume=True, **changes)


def test_a_search_of_another_backend_is_not_gone_on_with(three: Three) -> None:
    with pytest.raises(UsageError, match="another backend"):
        search(three.other, 4, make_nothing, resume=True)


@pytest.mark.nightly
def test_a_longer_search_runs_only_the_rest(three: Three, tmp_path: Path) -> None:
    search(tmp_path, 1)
    before = load_results(tmp_path).trials
    recorder = Recorder()
    longer = search(tmp_path, 3, resume=True, callbacks=[recorder])
    assert {what[0] for what in recorder.heard} == {1, 2}
    assert list(longer.trials["wall_seconds"])[:1] == list(before["wall_seconds"])
    assert_same_search(tmp_path, three.path)
    assert longer.study is not None
    assert [t.state for t in longer.study.trials] == [TrialState.COMPLETE] * 3


@pytest.mark.nightly
def test_ctrl_c_and_resuming_gives_the_undisturbed_tables(three: Three, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        search(tmp_path, 3, callbacks=[Recorder((1, 2), press_ctrl_c)])
    gc.collect()  # Ray's loggers leave files open, see conftest.py
    assert "interrupted" in list(load_results(tmp_path).trials["status"])
    result = search(tmp_path, 3, resume=True)
    assert_same_search(tmp_path, three.path)
    assert result.study is not None
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * 3


def test_a_killed_process_costs_nothing(tmp_path: Path) -> None:
    kill = {0.05: functools.partial(kill_once, tmp_path / "marker")}
    factory = functools.partial(make_eventful_at, events=kill)
    search(tmp_path / "run", 2, factory, space=RATE)
    assert (tmp_path / "marker").exists()
    run_study(make_tiny, n_trials=2, out=tmp_path / "other", **common(RATE))
    assert_same_search(tmp_path / "run", tmp_path / "other")


class Failed(NamedTuple):
    """A search that a mistake in the problem ended, and the cores that were free soon after."""

    path: Path
    error: pytest.ExceptionInfo[WorkerError]
    seconds: float
    free: float


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Failed:
    path, started = tmp_path_factory.mktemp("failed"), time.monotonic()
    with pytest.raises(WorkerError) as error:
        search(path, 2, functools.partial(make_faulty, fault="bug", after=6), space=RATE)
    ended = time.monotonic()
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < ended + 10.0:
        time.sleep(0.1)
    free = ray.available_resources().get("CPU", 0.0)
    return Failed(path, error, ended - started, free)


@pytest.mark.nightly
def test_a_failed_search_leaves_nothing_running(failed: Failed) -> None:
    assert failed.free == 2.0


@pytest.mark.nightly
def test_a_mistake_in_the_problem_ends_the_search_at_once_and_it_can_go_on(failed: Failed) -> None:
    assert failed.error.match(r"--resume tries it again(.|\n)*a mistake in the user's")
    assert failed.seconds < 30.0
    trials = load_results(failed.path).trials
    assert len(trials) == 1
    assert list(trials["status"]) != ["running"]
    mended = search(failed.path, 2, space=RATE, resume=True)
    assert mended.study is not None
    finished = [t for t in mended.study.trials if t.state is TrialState.COMPLETE]
    assert len(finished) == 2
    assert not [t for t in mended.study.trials if t.state is TrialState.RUNNING]
    assert list(mended.trials["status"]).count("complete") == 2
    assert not mended.steps.duplicated(["trial", "step"]).any()


@pytest.mark.nightly
@pytest.mark.parametrize("n", [0, 1], ids=["first", "second, in the same process"])
def test_a_mistake_that_the_package_names_is_raised_as_it_is(
    n: int, three: Three, tmp_path: Path
) -> None:
    """It comes where only a process of Ray's builds the problem."""
    events = {float(three.result.trials["meta_lr"][n]): raise_usage_error}
    factory = functools.partial(make_eventful_at, events=events, after=0)
    with pytest.raises(UsageError, match="this problem cannot be used so"):
        search(tmp_path, 3, factory)


def test_a_problem_that_cannot_be_built_leaves_no_run(tmp_path: Path) -> None:
    factory = functools.partial(make_eventful_at, events={0.05: raise_usage_error}, after=0)
    with pytest.raises(UsageError, match="this problem cannot be used so"):
        search(tmp_path, 2, factory)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


@pytest.mark.nightly
def test_what_a_scheduler_stops_is_pruned_and_counts(tmp_path: Path) -> None:
    budget = Budget(outer_steps=9, retrain=False)
    result = search(
        tmp_path,
        6,
        scheduler="asha",
        budget=budget,
        metric="search_loss",
        cpus_per_trial=1.0,
    )
    assert result.study is not None
    trials = result.study.trials
    assert len(trials) == len(result.trials) == 6
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert TrialState.PRUNED in {t.state for t in trials}
    for trial, row in zip(trials, result.trials.to_dict("records"), strict=True):
        pruned = trial.state is TrialState.PRUNED
        assert trial.user_attrs["stop_reason"] == row["stop_reason"]
        assert row["status"] == ("pruned" if pruned else "complete")
        assert (trial.last_step == 9) is not pruned
        assert trial.last_step == row["step"]
        assert trial.intermediate_values[row["step"]] == row["search_loss"]


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["min", "max"])
def test_diverged_trials_are_pruned_and_there_is_no_best(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = MetaSpace({"alpha": Float(1e6, 1e7)})
    budget, metric = Budget(outer_steps=9), "search_loss"
    result = search(tmp_path, 2, space=space, budget=budget, metric=metric, mode=mode)
    assert result.study is not None
    assert [t.state for t in result.study.trials] == [TrialState.PRUNED] * 2
    assert list(result.trials["stop_reason"]) == ["diverged"] * 2
    assert list(result.trials["status"]) == ["pruned"] * 2
    assert result.best is None
    assert result.failure is not None
    assert "2 diverged" in result.failure
    assert result.failure in caplog.text
    assert [t.user_attrs["mode"] for t in result.study.trials] == [mode] * 2
    # Before it diverged, each had a value; the worst one of its direction is not among them.
    assert all(abs(v) < 1e3 for t in result.study.trials for v in t.intermediate_values.values())


@pytest.mark.nightly
def test_a_population_has_tables_and_a_best_but_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedulers, "_PERTURBATIONS", 2)  # as it takes seconds each time
    budget = Budget(outer_steps=10, retrain=False)
    changes = {"scheduler": "pbt", "budget": budget, "metric": "search_loss"}
    result = search(tmp_path, 4, cpus_per_trial=1.0, **changes)
    assert result.study is None
    assert not (tmp_path / "study.journal").exists()
    assert list(result.trials["stop_reason"]) == ["done"] * 4
    assert (result.steps.groupby("trial").size() == 10).all()
    assert result.steps["donor"].notna().any()
    assert result.best is not None
    assert result.best["value"] == result.trials["search_loss"].min()
    for key, d in SPACE.distributions.items():
        assert not isinstance(d, Choice)
        assert result.steps[key].between(d.low, d.high).all()
    with pytest.raises(RunExistsError, match="holds a population"):
        search(tmp_path, 5, cpus_per_trial=1.0, resume=True, **changes)


def make_one_quadratic(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    """Return the same problem whatever the seed is, which decides on the members alone."""
    return make_quadratic(config, device, 0)


@pytest.mark.nightly
def test_a_member_that_was_good_once_does_not_multiply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedulers, "_PERTURBATIONS", 2)
    # At the higher rate the loss is lower after two steps than it ever is at the lower one, and
    # after four it is twice as high.
    space = MetaSpace({"meta_lr": Choice((0.05, 0.3))})
    changes: dict[str, Any] = {
        "scheduler": "pbt",
        "space": space,
        "budget": Budget(outer_steps=8, retrain=False),
        "config": MetaConfig(inner_lr=0.1, inner_optimizer="sgd"),
        "seed": 3,  # which draws the higher rate once
    }
    result = search(tmp_path, 4, factory=make_one_quadratic, cpus_per_trial=1.0, **changes)
    steps = result.steps.set_index(["trial", "step"])
    before: Any = steps["search_loss"].xs(4, level="step")
    assert steps["best_value"].xs(4, level="step").idxmin() != before.idxmin()
    exploits = steps["donor"].xs(5, level="step").dropna()
    assert len(exploits) == 1
    for heir, donor in exploits.items():
        assert before[donor] == before.min()
        assert before[heir] == before.max()
    kept, row = find_best(tmp_path), result.best
    assert row is not None
    assert (kept["trial"], kept["best_value"]) == (row["trial"], row["value"])
    assert kept["config"]["meta_lr"] == row["params"]["meta_lr"]


@pytest.mark.nightly
def test_a_population_goes_on_though_a_member_diverges_and_keeps_to_its_choices(
    tmp_path: Path,
) -> None:
    space = MetaSpace(
        {
            "inverse": Choice(("identity", "neumann")),
            "alpha": Float(1e-2, 1e7, log=True),
            "terms": Choice((1, 3)),
        }
    )
    budget = Budget(outer_steps=15, retrain=False)
    # The largest loss is looked for: a member that has diverged has none, and does not win.
    aim = {"metric": "search_loss", "mode": "max"}
    # The seed draws one that diverges at once; Ray perturbs by random numbers that have no seed.
    result = search(tmp_path, 4, space=space, scheduler="pbt", budget=budget, seed=5, **aim)
    complete = result.trials[result.trials["status"] == "complete"]
    assert result.best is not None
    assert result.best["value"] == complete["search_loss"].max() < 1e3
    assert (result.steps["solve_status"] == "diverged").any()
    assert set(result.trials["status"]) <= {"complete", "pruned"}
    assert result.steps["donor"].notna().any()
    assert set(result.steps["terms"].dropna()) <= {1, 3}


def test_a_population_is_measured_in_outer_steps(tmp_path: Path) -> None:
    budget = Budget(gradient_equivalents=100.0)
    with pytest.raises(UsageError, match="pbt compares trials at the same outer step"):
        search(tmp_path / "run", 4, scheduler="pbt", budget=budget)
    assert not (tmp_path / "run").exists()
