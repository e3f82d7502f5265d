"""Ray's driver looks at the folders of a run once, however many trials begin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ift_tune.search.ray import TablesCallback
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.tables import RunDirectory

TRIALS = 40


def test_folders_are_not_looked_at_anew_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = []
    records = RunDirectory.records

    def counted(run: RunDirectory) -> list[TrialRecord]:
        scans.append(run)
        return records(run)

    monkeypatch.setattr(RunDirectory, "records", counted)
    callback = TablesCallback(tmp_path / "run")
    storage = SimpleNamespace(experiment_dir_name="experiment")
    trials: list[Any] = [
        SimpleNamespace(trial_id=f"ray-{i}", config={}, storage=storage) for i in range(TRIALS)
    ]
    for trial in trials:
        callback.on_trial_start(0, trials, trial)
    assert len(scans) <= 2  # for the run's name, and for the numbers of trials
    assert [record.number for record in records(RunDirectory(tmp_path / "run", resume=True))] == [
        *range(TRIALS)
    ]
