"""The one writer of a trial's record, for trials of every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ift_tune.base.status import StopReason
from ift_tune.trial.record import TrialRecord, TrialWriter
from ift_tune.trial.tables import RunDirectory

FACTS = {"run_id": "toy-0", "trial": 0, "meta_lr": 0.1, "alpha": None}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, **more}


def begun(path: Path, *rows: int) -> TrialWriter:
    writer = TrialWriter(RunDirectory(path, resume=True).trial(0), FACTS)
    writer.begin()
    for step in rows:
        writer.append(row(step))
    return writer


def steps_of(record: TrialRecord, column: str = "step") -> list[Any]:
    return record.steps()[column].tolist()


def test_a_trial_runs_and_ends(tmp_path: Path) -> None:
    record = RunDirectory(tmp_path).trial(0)
    writer = TrialWriter(record, FACTS)
    assert not record.path.exists()
    writer.begin()
    assert record.facts() == FACTS | {"status": "running", "stop_reason": None}
    writer.append(row(1))
    writer.end(StopReason.DONE, {"learned_mean": 0.5})
    ended = {"learned_mean": 0.5, "status": "complete", "stop_reason": "done"}
    assert record.facts() == FACTS | ended
    assert steps_of(record) == [1]


@pytest.mark.parametrize(("last", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_trial_that_goes_on_drops_what_came_after(
    last: int, kept: list[int], tmp_path: Path
) -> None:
    record = begun(tmp_path, 1, 2, 3).record
    TrialWriter(record, FACTS).begin(last)
    assert steps_of(record) == kept if kept else record.steps().empty


@pytest.mark.parametrize("reopened", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_row_takes_the_place_of_those_from_its_step_on(
    step: int, reopened: bool, tmp_path: Path
) -> None:
    writer = begun(tmp_path, 1, 2, 3)
    if reopened:
        writer = begun(tmp_path)
    writer.append(row(step, loss=7.0))
    assert steps_of(writer.record) == list(range(1, step + 1))
    assert steps_of(writer.record, "loss")[-1] == 7.0


@pytest.mark.parametrize("step", [3, 4])
def test_half_a_line_is_not_gone_on_with(step: int, tmp_path: Path) -> None:
    record = begun(tmp_path, 1, 2, 3).record
    with (record.path / "steps.csv").open("a") as file:
        file.write("4,0.2")  # by a process that was killed
    writer = begun(tmp_path)
    for new in (step, step + 1):
        writer.append(row(new))
    assert steps_of(record) == list(range(1, step + 2))
    assert steps_of(record, "loss") == [1.0 / n for n in range(1, step + 2)]


def test_settings_that_change_stay_with_the_rows_before(tmp_path: Path) -> None:
    writer = begun(tmp_path, 1, 2)
    writer.update({"meta_lr": 0.3, "device": "cpu"})
    writer.append(row(3))
    writer = TrialWriter(writer.record, writer.record.facts())  # the driver begins again
    writer.begin()
    writer.append(row(4))
    writer.update({"meta_lr": 0.9})
    writer.append(row(5))
    assert steps_of(writer.record, "meta_lr") == [0.1, 0.1, 0.3, 0.3, 0.9]
    assert "device" not in writer.record.columns  # no setting
    assert writer.record.facts()["meta_lr"] == 0.9


def test_what_is_known_is_not_written_again(tmp_path: Path) -> None:
    writer = begun(tmp_path)
    file = writer.record.path / "trial.json"
    before = file.stat().st_ino  # each writing makes a new file
    writer.update({"meta_lr": 0.1})
    assert file.stat().st_ino == before
    writer.update({"new": None})
    assert file.stat().st_ino != before
