"""Many trials' files read together are the same tables as each read for itself, and sooner."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ift_tune import UsageError, load_results
from ift_tune.trial.record import TrialRecord, latest
from ift_tune.trial.tables import RunDirectory

SETTINGS = {"task": "toy", "seed": 0}
TRIALS: list[list[dict[str, Any]]] = [
    [{"step": n, "loss": 1.0 / n, "solve_status": "done"} for n in range(1, 5)],
    [],
    [{"step": 1, "loss": 1, "solve_status": "done"}, {"step": 2, "loss": 3, "solve_status": ""}],
    [{"step": 1, "loss": 0.5, "solve_status": "=1+1"}],
    [{"step": 1, "loss": 0.25, "note": 'a "quoted", word\nin two lines'}],
    [{"step": 1, "loss": None, "note": "5"}, {"step": 2, "loss": None, "note": None}],
    [{"step": 1, "loss": None, "note": "five"}],
    [{"step": 1, "loss": 0.1, "solve_status": "done", "-cmd": -1.5, "note": "@x"}],
    [
        {"step": 1, "search_loss": 1.0, "test_loss": 2.0, "val_test_gap": 0.1},
        {"step": 2, "search_loss": 0.9, "test_loss": None, "val_test_gap": None},
        {"step": 3, "search_loss": None, "test_loss": None, "val_test_gap": None},
    ],
    [{"step": 1, "loss": 0.75, "solve_status": "done"}],
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.begin(SETTINGS, {"python": "3"})
    for number, rows in enumerate(TRIALS):
        record = directory.trial(number)
        record.describe({"trial": number, "task": "toy", "alpha": None if number % 2 else 0.5})
        for row in rows:
            record.append(row)
    return directory


def same(one: Any, other: Any) -> bool:
    return bool((pd.isna(one) and pd.isna(other)) or one == other)


def test_each_trials_rows_are_those_of_its_own_file(run: RunDirectory) -> None:
    trials, steps = load_results(run.path)
    assert trials["trial"].tolist() == list(range(len(TRIALS)))
    assert steps["trial"].tolist() == [n for n, rows in enumerate(TRIALS) for _ in rows]
    for record in run.records():
        own, table = record.steps(), steps[steps["trial"] == record.number]
        for name in own:
            assert all(map(same, own[name], table[name])), (record.number, name)
        for name, value in latest(own).items():
            assert same(trials[name][record.number], value), (record.number, name)
        assert table["alpha"].isna().all() == (record.number % 2 == 1)
    notes = steps["note"].dropna().tolist()
    assert notes[0] == 'a "quoted", word\nin two lines'
    assert notes[-1] == "@x"
    assert steps["solve_status"].tolist()[6] == "=1+1"


def test_the_latest_of_the_test_split_is_that_of_the_last_evaluation(run: RunDirectory) -> None:
    trials, _ = load_results(run.path)
    assert trials["search_loss"][8] == 0.9
    assert np.isnan(trials["test_loss"][8])
    assert np.isnan(trials["val_test_gap"][8])


def test_the_file_that_is_damaged_is_named(run: RunDirectory) -> None:
    file = run.path / "trial-00002" / "steps.csv"
    file.write_text(f"{file.read_text()}3,too,many,cells,here\n")
    with pytest.raises(UsageError, match=r"trial-00002.steps\.csv is damaged"):
        load_results(run.path)


def test_half_a_line_is_no_row_and_a_blank_one_none_either(run: RunDirectory) -> None:
    before = load_results(run.path)
    for number, tail in ((0, "5,0."), (2, "\n")):
        file = run.path / f"trial-{number:05d}" / "steps.csv"
        file.write_text(f"{file.read_text()}{tail}")
    for table, now in zip(before, load_results(run.path), strict=True):
        pd.testing.assert_frame_equal(table, now)


def test_a_thousand_trials_are_read_in_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    run.begin(SETTINGS, {"python": "3"})
    first = run.trial(0)
    first.describe({"trial": 0, "task": "toy", **{f"setting{i}": i for i in range(40)}})
    for step in range(1, 21):
        numbers = {f"measured{i}": step / (i + 1) for i in range(20)}
        first.append({"step": step, "solve_status": "truncated", "skipped": 0.0, **numbers})
    for number in range(1, 1000):
        shutil.copytree(first.path, run.trial(number).path)
    alone: list[TrialRecord] = []
    monkeypatch.setattr(TrialRecord, "steps", alone.append)
    started = time.process_time()
    trials, steps = load_results(tmp_path)
    assert (len(trials), len(steps), alone) == (1000, 20_000, [])
    assert time.process_time() - started < 2.0
