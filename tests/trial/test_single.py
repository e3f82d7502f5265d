"""One inner run with its run directory."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_problems import (
    BUDGET,
    CONFIG,
    StopAt,
    assert_same_tables,
    comparable,
    make_faulty,
    make_nothing,
    make_quadratic,
    make_tiny,
)

from ift_tune import Budget, UsageError, load_results
from ift_tune.base.errors import Interrupted, RunExistsError
from ift_tune.base.status import Outcome, StopReason
from ift_tune.trial.session import run_single
from ift_tune.trial.trial import ProblemFactory


def single(out: Path, factory: ProblemFactory = make_tiny, **changes: Any) -> Outcome:
    settings: dict[str, Any] = {"task": "tiny", "config": CONFIG, "device": "cpu"}
    budget: Budget = changes.pop("budget", BUDGET)
    return run_single(factory, budget, out=out, **(settings | changes))


def test_a_run_leaves_both_tables_and_its_settings(tmp_path: Path) -> None:
    outcome = single(tmp_path / "run")
    trials, steps = load_results(tmp_path / "run")
    assert list(steps["step"]) == [1, 2, 3, 4]
    assert list(trials["stop_reason"]) == ["done"]
    assert set(steps["task"]) == {"tiny"}
    assert trials["search_error"].iloc[0] == outcome.value
    assert trials["retrained_test_error"].iloc[0] == outcome.metrics["retrained_test_error"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    tables = {f"{t}.{e}" for t in ("trials", "steps") for e in ("csv", "parquet")}
    assert names == tables | {"environment.json", "run.json", "trial-00000", "best", ".lock"}
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]["torch"]


def test_the_same_seed_repeats_the_tables_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        single(tmp_path / name, seed=seed)
    assert_same_tables(tmp_path / "a", tmp_path / "b")
    a, c = (load_results(tmp_path / name).steps for name in ("a", "c"))
    assert list(a["val_loss"]) != list(c["val_loss"])


def test_a_directory_with_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunExistsError, match=r"--out.*--resume"):
        single(tmp_path, make_nothing)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    single(Path("~/run"))
    assert len(load_results("~/run").steps) == len(load_results(home / "run").steps) > 0
    assert not list(here.iterdir())


def test_results_are_read_where_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single(tmp_path)
    expected = load_results(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    for mine, theirs in zip(load_results(tmp_path), expected, strict=True):
        pd.testing.assert_frame_equal(mine, theirs)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name a directory"):
        single(tmp_path / "file", make_nothing)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"config": CONFIG.updated({"meta_lr": 0.06})}, "config"),
        ({"budget": Budget(outer_steps=3)}, "budget"),
        ({"budget": Budget(outer_steps=5, eval_every=2)}, "budget"),
        ({"task": "other"}, "task"),
        ({"metric": "search_loss"}, "metric"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    single(tmp_path)
    with pytest.raises(UsageError, match=f"another {named};"):
        single(tmp_path, make_nothing, resume=True, **changes)


@pytest.mark.parametrize(
    "factory", [make_tiny, make_quadratic, functools.partial(make_faulty, fault="nan", after=9)]
)
def test_resuming_a_finished_run_changes_nothing(factory: ProblemFactory, tmp_path: Path) -> None:
    first = single(tmp_path, factory)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.csv")}
    again = single(tmp_path, make_nothing, resume=True)
    assert (again.stop_reason, again.value, again.metric) == (
        first.stop_reason,
        first.value,
        first.metric,
    )
    assert {p: p.read_bytes() for p in before} == before
    json.dumps(again.metrics)


def test_a_resumed_finished_run_has_the_last_value_even_if_a_later_step_was_not_evaluated(
    tmp_path: Path,
) -> None:
    factory = functools.partial(make_faulty, fault="nan", after=9)
    budget = Budget(outer_steps=9, eval_every=2)
    first = single(tmp_path, factory, budget=budget)
    assert first.stop_reason is StopReason.NONFINITE
    assert first.value is not None
    again = single(tmp_path, make_nothing, budget=budget, resume=True)
    assert again.value == first.value


@pytest.mark.parametrize("step", [1, 3])
def test_ctrl_c_saves_and_resuming_ends_as_if_undisturbed(step: int, tmp_path: Path) -> None:
    single(tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        single(tmp_path / "run", callbacks=[StopAt(step)])
    interrupted = load_results(tmp_path / "run")
    assert list(interrupted.trials["status"]) == ["interrupted"]
    assert list(interrupted.steps["step"]) == list(range(1, step + 1))
    assert (tmp_path / "run" / "trials.parquet").exists()
    outcome = single(tmp_path / "run", resume=True)
    assert outcome.stop_reason is StopReason.DONE
    assert_same_tables(tmp_path / "run", tmp_path / "undisturbed")


def test_a_failed_run_can_be_resumed_once_it_is_mended(tmp_path: Path) -> None:
    single(tmp_path / "undisturbed")
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        single(tmp_path / "run", functools.partial(make_faulty, fault="bug", after=6))
    assert list(load_results(tmp_path / "run").trials["status"]) == ["failed"]
    single(tmp_path / "run", resume=True)
    assert_same_tables(tmp_path / "run", tmp_path / "undisturbed")


def test_the_written_tables_are_those_that_load(tmp_path: Path) -> None:
    single(tmp_path)
    loaded = load_results(tmp_path)
    for folder in tmp_path.glob("trial-*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    stored = load_results(tmp_path)
    for one, other in zip(loaded, stored, strict=True):
        assert list(one.columns) == list(other.columns)
        assert comparable(one)["train_loss"].tolist() == comparable(other)["train_loss"].tolist()
