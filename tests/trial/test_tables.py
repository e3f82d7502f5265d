"""The two result tables: written as the run goes, exact, and refused where they would mix."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ift_tune import UsageError, load_results
from ift_tune.base.errors import IFTTuneError, RunExistsError
from ift_tune.base.files import read_json
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.tables import (
    COST_COLUMNS,
    IDENTITY_COLUMNS,
    INTEGER_COLUMNS,
    METRIC_COLUMNS,
    RunDirectory,
)

FIXED = [*IDENTITY_COLUMNS, *METRIC_COLUMNS, "retrained_test_error", *COST_COLUMNS]
SETTINGS = {"task": "toy", "seed": 3, "budget": {"outer_steps": 2}, "space": None}


def _facts(trial: int, **more: Any) -> dict[str, Any]:
    return {
        "run_id": "toy-0",
        "task": "toy",
        "arm": "ift",
        "seed": 3,
        "trial": trial,
        "status": "running",
        "stop_reason": None,
        "device": "cpu",
        "alpha": 0.1 + trial,
        **more,
    }


def _row(step: int, **more: Any) -> dict[str, Any]:
    row = {"step": step, "train_loss": 1.0 / step, "hvps": float(5 * step), "solve_status": "done"}
    return {**row, "peak_memory_bytes": None, **more}


def _run(path: Path, trials: int = 2, steps: int = 3) -> RunDirectory:
    directory = RunDirectory(path)
    directory.begin(SETTINGS, {"python": "3"})
    for number in range(trials):
        record = directory.trial(number)
        record.describe(_facts(number))
        for step in range(1, steps + 1):
            record.append(_row(step))
    return directory


# The directory


def test_a_directory_that_holds_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    RunDirectory(path)
    assert not (tmp_path / "deep").exists()  # nothing is written yet
    path.mkdir(parents=True)
    RunDirectory(path)  # empty, so nothing can be lost
    (path / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match=r"another --out, or --resume"):
        RunDirectory(path)
    assert isinstance(RunExistsError("x"), UsageError | FileExistsError)
    RunDirectory(path, resume=True)
    assert (path / "notes.txt").read_text() == "mine"


def test_resuming_what_is_not_there_begins_it(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "new", resume=True).records() == []


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is a file"):
            RunDirectory(tmp_path / "file", resume=resume)


def test_a_run_is_known_by_its_settings(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "a").begin(SETTINGS, {"python": "3"})
    assert first.startswith("toy-")
    assert RunDirectory(tmp_path / "b").begin(SETTINGS, {"python": "4"}) == first
    assert RunDirectory(tmp_path / "c").begin({**SETTINGS, "seed": 4}, {}) != first
    assert read_json(tmp_path / "b" / "environment.json") == {"python": "4"}


def test_the_order_of_the_settings_does_not_matter(tmp_path: Path) -> None:
    backwards = dict(reversed(SETTINGS.items()))
    first = RunDirectory(tmp_path / "a").begin(SETTINGS, {})
    assert RunDirectory(tmp_path / "b").begin(backwards, {}) == first
    assert RunDirectory(tmp_path / "a", resume=True).begin(backwards, {}) == first


def test_a_resumed_run_keeps_its_id_and_refuses_other_settings(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path).begin(SETTINGS, {})
    resumed = RunDirectory(tmp_path, resume=True)
    assert resumed.begin(SETTINGS, {"python": "5"}) == first
    changed = {**SETTINGS, "seed": 4, "budget": {"outer_steps": 9}, "new": 1}
    with pytest.raises(UsageError, match=r"another budget, new, seed; resume with the same"):
        resumed.begin(changed, {})
    assert resumed.begin(SETTINGS, {}) == first


def test_a_setting_that_is_gone_is_named(tmp_path: Path) -> None:
    resumed = RunDirectory(tmp_path)
    resumed.begin(SETTINGS, {})
    for key in ("budget", "space"):
        with pytest.raises(UsageError, match=f"begun with another {key};"):
            resumed.begin({k: v for k, v in SETTINGS.items() if k != key}, {})


def test_records_come_in_order(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for number in (10, 2, 0):
        directory.trial(number).describe(_facts(number))
    assert [r.facts()["trial"] for r in directory.records()] == [0, 2, 10]


# One trial's record


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_floats_come_back_to_the_bit(tmp_path_factory: Any, values: list[float]) -> None:
    record = TrialRecord(tmp_path_factory.mktemp("trial"))
    for step, value in enumerate(values):
        record.append({"step": step, "value": value})
    found = record.steps()["value"]
    assert [float(v).hex() for v in found] == [value.hex() for value in values]
    record.append({"step": 99, "value": 0.5, "other": 0.1})  # rewrites what was there
    assert [float(v).hex() for v in record.steps()["value"][:-1]] == [v.hex() for v in values]


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.5), np.int64(3)])
def test_numpy_scalars_are_numbers(tmp_path: Path, value: Any) -> None:
    record = TrialRecord(tmp_path / "t")
    record.append({"step": 1, "value": value})
    assert record.steps()["value"].tolist() == [value.item()]


def test_missing_values_are_empty_and_come_back_as_missing(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "t")
    record.append({"step": 1, "loss": math.nan, "word": None, "size": 7})
    record.append({"step": 2, "loss": 0.5, "word": "x", "size": None})
    record.append({"step": 3})
    assert (tmp_path / "t" / "steps.csv").read_text().splitlines()[1:] == [
        "1,,,7",
        "2,0.5,x,",
        "3,,,",
    ]
    assert record.steps()["loss"].isna().tolist() == [True, False, True]
    assert record.steps()["word"].isna().tolist() == [True, False, True]


def test_a_new_column_is_added_to_the_earlier_rows(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "t")
    record.append({"step": 1, "loss": 0.1})
    record.append({"step": 2, "loss": 0.2, "test_loss": 0.3, "flag": True})
    record.append({"loss": 0.4, "step": 3})
    table = record.steps()
    assert list(table) == ["step", "loss", "test_loss", "flag"]
    assert table["step"].tolist() == [1, 2, 3]
    assert table["loss"].tolist() == [0.1, 0.2, 0.4]
    assert table["test_loss"].isna().tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["f1, macro", 'the "best"', "with space"])
def test_a_column_may_have_any_name(tmp_path: Path, name: str) -> None:
    TrialRecord(tmp_path / "t").append({"step": 1, name: 0.5})
    reopened = TrialRecord(tmp_path / "t")
    reopened.append({"step": 2, name: 0.25})
    assert list(reopened.steps()) == ["step", name]
    assert reopened.steps()[name].tolist() == [0.5, 0.25]


def test_a_reopened_record_goes_on_with_its_columns(tmp_path: Path) -> None:
    TrialRecord(tmp_path / "t").append({"step": 1, "loss": 0.1, "error": 0.5})
    TrialRecord(tmp_path / "t").append({"error": 0.4, "loss": 0.2, "step": 2})
    TrialRecord(tmp_path / "t").append({"step": 3, "extra": 1.0})
    table = TrialRecord(tmp_path / "t").steps()
    assert table["error"].tolist()[:2] == [0.5, 0.4]
    assert list(table) == ["step", "loss", "error", "extra"]
    assert table["step"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("torn", ["4", "4,0.", "4,0.25"])
def test_a_half_written_last_line_is_not_read_and_can_be_redone(tmp_path: Path, torn: str) -> None:
    record = TrialRecord(tmp_path / "t")
    for step in (1, 2, 3):
        record.append({"step": step, "loss": 1.0 / step})
    path = tmp_path / "t" / "steps.csv"
    with path.open("a") as file:
        file.write(torn)  # killed before the end of the line
    record = TrialRecord(tmp_path / "t")
    assert record.steps()["step"].tolist() == [1, 2, 3]
    record.truncate(2)
    record.append({"step": 3, "loss": 0.75})
    assert record.steps()["step"].tolist() == [1, 2, 3]
    assert record.steps()["loss"].tolist() == [1.0, 0.5, 0.75]


@pytest.mark.parametrize("last", [0, 1, 3, 9])
def test_truncating_drops_what_came_after(tmp_path: Path, last: int) -> None:
    record = TrialRecord(tmp_path / "t")
    for step in (1, 2, 3):
        record.append({"step": step, "loss": 1.0 / step})
    record.truncate(last)
    kept = [step for step in (1, 2, 3) if step <= last]
    assert len(record.steps()) == len(kept)
    record.append({"step": 4, "loss": 0.25, "word": "x"})
    assert record.steps()["step"].tolist() == [*kept, 4]
    assert list(record.steps()) == ["step", "loss", "word"]


def test_truncating_nothing_is_nothing(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "t")
    record.truncate(3)
    assert record.steps().empty
    record.append({"step": 1, "loss": 0.5})
    assert record.steps()["loss"].tolist() == [0.5]


def test_facts_are_replaced_whole(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "t")
    assert record.facts() == {}
    record.describe({"a": 0.1 + 0.2, "b": None})
    record.describe({"a": 0.1 + 0.2})
    assert TrialRecord(tmp_path / "t").facts() == {"a": 0.1 + 0.2}


# Both tables


def _check_schema(table: pd.DataFrame, extra: list[str]) -> None:
    assert list(table) == [*FIXED, *extra]
    whole = [column for column in INTEGER_COLUMNS if column != "donor"]  # only where one is
    assert {str(table[column].dtype) for column in whole} == {"Int64"}
    measured = ["train_loss", "alpha"]
    assert {str(table[column].dtype) for column in measured} == {"float64"}


def test_a_running_run_can_be_loaded(tmp_path: Path) -> None:
    _run(tmp_path)
    trials, steps = load_results(tmp_path)
    _check_schema(steps, ["solve_status", "alpha"])
    _check_schema(trials, ["solve_status", "alpha", "diagnoses"])
    assert steps["trial"].tolist() == [0, 0, 0, 1, 1, 1]
    assert steps["step"].tolist() == [1, 2, 3, 1, 2, 3]
    assert steps["train_loss"].tolist() == [1.0, 0.5, 1.0 / 3.0] * 2
    assert steps["alpha"].tolist() == [0.1] * 3 + [1.1] * 3
    assert steps["hvps"].tolist() == [5, 10, 15] * 2
    assert trials["step"].tolist() == [3, 3]
    assert trials["train_loss"].tolist() == [1.0 / 3.0] * 2
    assert trials["status"].tolist() == ["running", "running"]
    assert trials["stop_reason"].isna().all()
    assert trials["peak_memory_bytes"].isna().all()
    assert trials["test_error"].isna().all()


def test_a_finished_run_is_the_same_from_either_form(tmp_path: Path) -> None:
    directory = _run(tmp_path / "run")
    directory.trial(0).append(_row(4, test_error=0.5, peak_memory_bytes=2**40))
    directory.trial(0).describe(
        _facts(0, status="complete", stop_reason="done", retrained_test_error=0.25, learned=1.5)
    )
    directory.write_tables()
    loaded = load_results(tmp_path / "run")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("trials", "steps"):
        shutil.copy(tmp_path / "run" / f"{name}.parquet", alone)
    for found, expected in zip(load_results(alone), loaded, strict=True):
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
        assert list(found) == list(expected)
        _check_schema(found, [str(c) for c in expected if c not in FIXED])
    assert loaded.trials["stop_reason"].iloc[0] == "done"
    assert loaded.trials["retrained_test_error"].iloc[0] == 0.25
    assert loaded.trials["peak_memory_bytes"].iloc[0] == 2**40
    assert loaded.steps["test_error"].notna().tolist() == [False] * 3 + [True] + [False] * 3
    written = pd.read_csv(tmp_path / "run" / "steps.csv")
    assert list(written) == list(loaded.steps)
    assert written["train_loss"].tolist() == loaded.steps["train_loss"].tolist()


def test_trials_of_different_columns_stand_in_one_table(tmp_path: Path) -> None:
    directory = _run(tmp_path, trials=1)
    other = directory.trial(1)
    other.describe({**_facts(1), "rank": 4, "warm_start": True, "note": "x"})
    other.append({"step": 1, "val_loss": 0.5})
    trials, steps = directory.write_tables()
    assert trials["rank"].isna().tolist() == [True, False]
    assert steps["val_loss"].isna().tolist() == [True] * 3 + [False]
    assert [str(trials[c].dtype) for c in ("train_loss", "val_loss")] == ["float64"] * 2
    assert load_results(tmp_path).trials["note"].iloc[1] == "x"


def test_a_trial_that_did_not_step_has_its_row_in_trials(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.trial(0).describe(_facts(0, status="failed", stop_reason="failed"))
    directory.trial(1)  # made, but nothing written yet
    trials, steps = directory.write_tables()
    assert trials["stop_reason"].tolist() == ["failed"]
    assert list(steps)[: len(FIXED)] == FIXED
    assert len(steps) == 0
    assert len(load_results(tmp_path).steps) == 0


def test_a_run_without_trials_has_empty_tables(tmp_path: Path) -> None:
    for table in RunDirectory(tmp_path).write_tables():
        assert list(table) == FIXED
        assert len(table) == 0
    assert [len(table) for table in load_results(tmp_path)] == [0, 0]


@pytest.mark.parametrize("name", ["nothing here", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IFTTuneError, match="holds no run"):
        load_results(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


# Settings that change in the middle of a trial


def test_filled_constants_stay_with_the_rows_before_a_change(tmp_path: Path) -> None:
    directory = _run(tmp_path, trials=1, steps=2)
    record = directory.trial(0)
    record.fill({"alpha": 0.1, "meta_optimizer": "adam", "terms": 3})
    record.describe(_facts(0, alpha=0.5, meta_optimizer="sgd", terms=4))
    record.append(_row(3, alpha=0.5, meta_optimizer="sgd", terms=4))
    record.fill({"alpha": 0.5, "rank": 7})  # alpha is in the rows already, rank is not
    record.describe(_facts(0, alpha=0.9, meta_optimizer="sgd", terms=4, rank=8))
    record.append(_row(4, alpha=0.9, meta_optimizer="sgd", terms=4, rank=8))
    trials, steps = directory.write_tables()
    assert steps["alpha"].tolist() == [0.1, 0.1, 0.5, 0.9]
    assert steps["meta_optimizer"].tolist() == ["adam", "adam", "sgd", "sgd"]
    assert steps["terms"].tolist() == [3, 3, 4, 4]
    assert steps["rank"].tolist() == [7, 7, 7, 8]
    assert steps["train_loss"].tolist() == [1.0, 0.5, 1.0 / 3.0, 0.25]
    assert trials[["alpha", "meta_optimizer", "rank"]].iloc[0].tolist() == [0.9, "sgd", 8]


def test_a_reopened_record_knows_what_was_filled(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "t")
    record.append({"step": 1})
    record.fill({"alpha": 0.1 + 0.2})
    reopened = TrialRecord(tmp_path / "t")
    assert reopened.columns == ["step", "alpha"]
    reopened.append({"step": 2, "alpha": 0.5})
    assert reopened.steps()["alpha"].tolist() == [0.1 + 0.2, 0.5]


def test_nothing_is_filled_where_there_are_no_rows(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "t")
    record.fill({"alpha": 0.1})
    assert record.steps().empty
    assert record.columns == []
    record.append({"step": 1})
    assert list(record.steps()) == ["step"]


def test_a_donor_is_a_whole_number_in_its_row_and_missing_in_others(tmp_path: Path) -> None:
    directory = _run(tmp_path, trials=2, steps=2)
    assert "donor" not in directory.write_tables().steps
    directory.trial(1).append(_row(3, donor=0))
    directory.trial(1).append(_row(4))
    trials, steps = directory.write_tables()
    assert str(steps["donor"].dtype) == str(trials["donor"].dtype) == "Int64"
    assert steps["donor"].isna().tolist() == [True] * 4 + [False, True]
    assert steps["donor"].iloc[4] == 0
    assert trials["donor"].isna().tolist() == [True, False]
