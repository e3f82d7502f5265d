"""A study of one's own: its tables, its total of trials, and its resumption."""

from __future__ import annotations

import functools
import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages.journal import _file as optuna_file
from optuna.trial import FrozenTrial, TrialState
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    PruneAtSecondReport,
    assert_same_tables,
    make_faulty,
    make_nothing,
    make_tiny,
)

from ift_tune import Budget, MetaConfig, UsageError, load_results
from ift_tune.base.errors import Interrupted, RunExistsError
from ift_tune.base.status import HEALTH_COLUMNS, Outcome
from ift_tune.joint.callbacks import Callback
from ift_tune.search.analysis import best_point
from ift_tune.search.pruners import make_pruner
from ift_tune.search.result import StudyResult
from ift_tune.search.samplers import sampler_factory, trial_seed
from ift_tune.search.space import Float, MetaSpace
from ift_tune.search.study import run_study
from ift_tune.trial.trial import ProblemFactory

NAMED_COLUMNS = {
    *("run_id", "task", "arm", "seed", "trial", "step", "status", "stop_reason"),
    *(f"{s}_{k}" for s in ("train", "val", "search", "test") for k in ("loss", "error")),
    "retrained_test_error",
    *("wall_seconds", "gradient_equivalents", "hvps", "peak_memory_bytes", "device"),
    *MetaConfig.flat_keys(),
    *HEALTH_COLUMNS,
}
ALWAYS_THERE = {
    *("run_id", "task", "arm", "seed", "trial", "step", "status", "stop_reason", "device"),
    *(f"{s}_{k}" for s in ("train", "val", "search", "test") for k in ("loss", "error")),
    *("retrained_test_error", "wall_seconds", "gradient_equivalents", "hvps"),
    *CONFIG.to_flat(),
    *HEALTH_COLUMNS,
}


@pytest.fixture(scope="module", autouse=True)
def collect_only_what_the_tests_made() -> Iterator[None]:
    """Spare the libraries from every trial's `gc.collect()`, most of a small trial's time."""
    gc.freeze()
    yield
    gc.unfreeze()


def early_tpe(seed: int, trial_number: int) -> optuna.samplers.BaseSampler:
    """Return a sampler that learns from the first trial on."""
    return optuna.samplers.TPESampler(seed=trial_seed(seed, trial_number), n_startup_trials=1)


def study(out: Path, n_trials: int = 2, factory: ProblemFactory = make_tiny, **changes: Any) -> Any:
    space: MetaSpace = changes.pop("space", SPACE)
    budget: Budget = changes.pop("budget", BUDGET)
    settings: dict[str, Any] = {"task": "tiny", "config": CONFIG, "device": "cpu"}
    settings |= {"sampler": early_tpe} | changes
    return run_study(factory, space, budget, n_trials=n_trials, out=out, **settings)


def params_of(result: StudyResult) -> list[dict[str, Any]]:
    return [t.params for t in result.study.trials]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    """An undisturbed study of five trials, of which model-based sampling chose four."""
    path = tmp_path_factory.mktemp("study") / "run"
    result: StudyResult = study(path, 5)
    return path, result


class Stop(Callback):
    """Presses Ctrl-C, or dies, at a step of a trial (step 0: when the trial has ended)."""

    def __init__(self, trial: int, step: int, action: Callable[[], object]) -> None:
        self._at, self._action = (trial, step), action

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        if (number, row["step"]) == self._at:
            self._action()

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        if (number, 0) == self._at:
            self._action()


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def die() -> None:
    raise KeyboardInterrupt


SOMETIMES_EMPTY = {"val_test_gap", "hypergradient_agreement", "hypergradient_signal"}


@pytest.mark.parametrize("which", ["trials", "steps"])
def test_both_tables_have_every_column(which: str, five: tuple[Path, StudyResult]) -> None:
    table: pd.DataFrame = getattr(five[1], which)
    assert set(table.columns) >= NAMED_COLUMNS
    assert table.columns.is_unique
    assert table[sorted(ALWAYS_THERE - SOMETIMES_EMPTY)].notna().all().all()


def test_there_is_a_row_a_step_and_a_row_a_trial(five: tuple[Path, StudyResult]) -> None:
    _, (_, trials, steps) = five
    assert list(trials["trial"]) == [0, 1, 2, 3, 4]
    assert not steps.duplicated(["trial", "step"]).any()
    for _, rows in steps.groupby("trial"):
        assert list(rows["step"]) == [1, 2, 3, 4]
        assert rows["wall_seconds"].astype(float).is_monotonic_increasing
        assert rows["gradient_equivalents"].astype(float).is_monotonic_increasing
    best = steps.groupby("trial")["search_error"].min()  # which is kept, and so is the trial's
    assert list(best) == list(trials["search_error"])


@pytest.mark.parametrize("which", ["trials", "steps"])
def test_numbers_are_numbers(which: str, five: tuple[Path, StudyResult]) -> None:
    table: pd.DataFrame = getattr(load_results(five[0]), which)
    numbers = {c for c in ALWAYS_THERE if c.endswith(("_loss", "_error", "_seconds", "_norm"))}
    numbers |= {"seed", "trial", "step", "hvps", "alpha", "meta_lr", "gradient_equivalents"}
    wrong = {c: str(table[c].dtype) for c in numbers if not is_numeric(table[c])}
    assert wrong == {}


def is_numeric(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column.dtype))


def test_tables_agree_with_the_study(five: tuple[Path, StudyResult]) -> None:
    path, (made, trials, _) = five
    frame = made.trials_dataframe()
    assert made.metric_names == ["search_error"]  # as dashboards show them, and this frame
    assert list(frame["value_search_error"]) == list(trials["search_error"])
    for key in SPACE.distributions:
        assert list(frame[f"params_{key}"]) == list(trials[key])
    assert set(trials["run_id"]) == {made.study_name}
    assert trials["arm"].nunique() == 1
    for name, mine in zip(("trials", "steps"), load_results(path), strict=True):
        stored = pd.read_csv(path / f"{name}.csv", engine="pyarrow")  # exact in each version
        assert len(stored) == len(mine) == len(pd.read_parquet(path / f"{name}.parquet"))
        assert list(stored["train_loss"]) == list(mine["train_loss"])


def test_the_best_point_is_the_first_of_the_lowest(five: tuple[Path, StudyResult]) -> None:
    _, (made, trials, _) = five
    best = best_point(made)
    assert best is not None
    lowest = trials["search_error"].astype(float)
    assert best["value"] == lowest.min()
    assert best["trial"] == int(lowest.argmin())
    assert json.loads(json.dumps(best)) == best


def test_the_same_seed_repeats_the_tables_and_another_does_not(
    five: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    study(tmp_path / "same", 5)
    assert_same_tables(tmp_path / "same", five[0])
    other = study(tmp_path / "other", 2, seed=1)
    assert params_of(other) != params_of(five[1])[:2]
    assert list(other.steps["val_loss"][:4]) != list(five[1].steps["val_loss"][:4])


def test_n_trials_is_the_total_and_resuming_goes_on_as_a_longer_study(
    five: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    first = study(tmp_path, 2)
    assert params_of(first) == params_of(five[1])[:2]
    same = study(tmp_path, 2, make_nothing, resume=True)
    assert len(same.trials) == 2
    longer = study(tmp_path, 5, resume=True)
    assert params_of(longer) == params_of(five[1])
    assert_same_tables(tmp_path, five[0])


@pytest.mark.parametrize("step", [1, 3, 0])
def test_ctrl_c_in_a_study_then_resuming_gives_the_undisturbed_tables(
    step: int, five: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        study(tmp_path, 5, callbacks=[Stop(2, step, press_ctrl_c)])
    torn = load_results(tmp_path)
    ended = ["complete", "complete", "interrupted" if step else "complete"]
    assert list(torn.trials["status"]) == ended
    resumed = study(tmp_path, 5, resume=True)
    assert [t.state for t in resumed.study.trials] == [TrialState.COMPLETE] * 5
    assert params_of(resumed) == params_of(five[1])
    assert_same_tables(tmp_path, five[0])


@pytest.mark.parametrize("step", [1, 3, 0])
def test_dying_in_a_study_then_resuming_gives_the_undisturbed_tables(
    step: int, five: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, 5, callbacks=[Stop(2, step, die)])
    resumed = study(tmp_path, 5, resume=True)
    assert [t.state for t in resumed.study.trials] == [TrialState.COMPLETE] * 5
    reports = [t.intermediate_values for t in resumed.study.trials]
    assert reports == [t.intermediate_values for t in five[1].study.trials]
    assert_same_tables(tmp_path, five[0])


class MayDie(PruneAtSecondReport):
    """Kills the process, if it shall, when it is asked about the second report."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        prune = super().prune(study, trial)
        if prune and self.dies:
            die()
        return prune


@pytest.mark.parametrize("when", ["asked", "pruned"])
def test_dying_while_a_trial_is_pruned_then_resuming_prunes_at_the_same_step(
    when: str, tmp_path: Path
) -> None:
    study(tmp_path / "undisturbed", 2, pruner=MayDie())
    pruner = MayDie(dies=when == "asked")
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "run", 2, pruner=pruner, callbacks=[Stop(0, 0, die)])
    resumed = study(tmp_path / "run", 2, pruner=MayDie(), resume=True)
    assert [t.state for t in resumed.study.trials] == [TrialState.PRUNED] * 2
    assert_same_tables(tmp_path / "run", tmp_path / "undisturbed")


def test_pruned_trials_count_as_finished(tmp_path: Path) -> None:
    result = study(tmp_path, 2, pruner=PruneAtSecondReport())
    assert [t.state for t in result.study.trials] == [TrialState.PRUNED] * 2
    assert list(result.trials["status"]) == list(result.trials["stop_reason"]) == ["pruned"] * 2
    assert list(result.steps["step"]) == [1, 2, 1, 2]


def test_a_study_without_a_complete_trial_has_no_best_point(tmp_path: Path) -> None:
    space = MetaSpace({"alpha": Float(1e6, 1e7)})
    result = study(tmp_path, 2, space=space, budget=Budget(outer_steps=9))
    assert list(result.trials["stop_reason"]) == ["diverged"] * 2
    assert list(result.trials["status"]) == ["pruned"] * 2
    assert best_point(result.study) is None


def test_an_exception_propagates_and_the_study_can_go_on(tmp_path: Path) -> None:
    space = MetaSpace({"meta_lr": Float(0.01, 0.1)})
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        study(tmp_path, 2, functools.partial(make_faulty, fault="bug", after=6), space=space)
    assert list(load_results(tmp_path).trials["stop_reason"]) == ["failed"]
    mended = study(tmp_path, 2, space=space, resume=True)
    assert [t.state for t in mended.study.trials] == [TrialState.COMPLETE] * 2
    assert list(mended.trials["status"]) == ["complete"] * 2


def test_an_existing_directory_is_refused(five: tuple[Path, StudyResult]) -> None:
    before = {p: p.stat().st_mtime_ns for p in five[0].rglob("*")}
    with pytest.raises(RunExistsError, match=r"--out.*--resume"):
        study(five[0], 6, make_nothing)
    assert {p: p.stat().st_mtime_ns for p in five[0].rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"space": MetaSpace({"alpha": Float(0.1, 0.2)})}, "space"),
        ({"config": CONFIG.updated({"inner_lr": 0.03})}, "config"),
        ({"budget": Budget(outer_steps=5)}, "budget"),
        ({"metric": "search_loss"}, "metric"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    changes: dict[str, Any], named: str, five: tuple[Path, StudyResult]
) -> None:
    with pytest.raises(UsageError, match=f"another {named};"):
        study(five[0], 6, make_nothing, resume=True, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": 0}, "n_trials must be an integer of at least 1"),
        ({"space": MetaSpace({"alpha": Float(0.0, 1.0)})}, "alpha"),
        ({"device": "gpu0"}, "device"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        study(tmp_path / "run", factory=make_nothing, **arguments)
    assert not (tmp_path / "run").exists()


def test_a_lock_left_by_a_killed_process_does_not_hold_up_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, 1, callbacks=[Stop(0, 1, die)])
    journal = tmp_path / "study.journal"
    (tmp_path / "study.journal.lock").symlink_to(journal)  # as Optuna locks it
    clock = FakeClock()
    monkeypatch.setattr(optuna_file, "time", clock)
    resumed = study(tmp_path, 1, resume=True)
    assert len(resumed.trials) == 1
    assert clock.monotonic() < 5.0


class FakeClock:
    """Stands for the module `time`; sleeping takes no time."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_the_study_can_be_kept_elsewhere(
    scheme: str, five: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    place = tmp_path / "study.file"
    url = f"{scheme}://{'/' if scheme == 'sqlite' else ''}{place}"
    study(tmp_path / "run", 1, storage=url, study_name="mine")
    assert place.exists()
    assert not (tmp_path / "run" / "study.journal").exists()
    resumed = study(tmp_path / "run", 2, storage=url, study_name="mine", resume=True)
    assert resumed.study.study_name == "mine"
    assert params_of(resumed) == params_of(five[1])[:2]


def test_an_optuna_storage_is_taken_as_it_is(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    study(tmp_path / "run", 1, storage=storage, study_name="mine")
    assert len(optuna.load_study(study_name="mine", storage=storage).trials) == 1


def test_a_stored_study_that_maximises_is_refused(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="mine", direction="maximize")
    with pytest.raises(UsageError, match="direction='minimize'"):
        study(tmp_path, 1, storage=storage, study_name="mine")


def test_callbacks_are_called_after_each_trial(tmp_path: Path) -> None:
    seen: list[tuple[str, int, TrialState]] = []

    def note(made: optuna.Study, trial: FrozenTrial) -> None:
        seen.append((made.study_name, trial.number, trial.state))

    result = study(tmp_path, 2, callbacks=[note])
    name = result.study.study_name
    assert seen == [(name, 0, TrialState.COMPLETE), (name, 1, TrialState.COMPLETE)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("none", optuna.pruners.NopPruner),
        ("median", optuna.pruners.MedianPruner),
        ("hyperband", optuna.pruners.HyperbandPruner),
    ],
)
def test_pruners_by_name(name: str, kind: type[optuna.pruners.BasePruner]) -> None:
    assert type(make_pruner(name)) is kind


@pytest.mark.parametrize("make", [sampler_factory, make_pruner])
def test_an_unknown_name_is_refused_with_the_known_ones(make: Callable[[str], object]) -> None:
    with pytest.raises(UsageError, match=r"unknown (sampler|pruner) 'randon'"):
        make("randon")


def test_nobody_is_pruned_unless_asked_for(five: tuple[Path, StudyResult]) -> None:
    assert type(five[1].study.pruner) is optuna.pruners.NopPruner
