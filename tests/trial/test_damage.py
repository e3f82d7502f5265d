"""A trial whose checkpoint or rows were damaged ends in the undisturbed tables, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_problems import CONFIG, StopAt, assert_same_tables, make_tiny

from ift_tune import Budget, Callback
from ift_tune.base.checkpoints import generations, previous
from ift_tune.base.errors import CheckpointError, Interrupted
from ift_tune.trial import runner
from ift_tune.trial.session import run_single


class StepsTaken(Callback):
    """Notes which steps were taken."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self.steps.append(row["step"])


def single(out: Path, **options: Any) -> None:
    run_single(make_tiny, Budget(outer_steps=8), out=out, config=CONFIG, device="cpu", **options)


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after step 5, with checkpoints of steps 5 and 4."""
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    single(tmp_path / "whole")
    with pytest.raises(Interrupted):
        single(tmp_path / "cut", callbacks=[StopAt(5)])
    return tmp_path / "cut" / "trial-00000"


def resume(cut: Path) -> list[int]:
    taken = StepsTaken()
    single(cut.parent, resume=True, callbacks=[taken])
    assert_same_tables(cut.parent, cut.parent.with_name("whole"))
    return taken.steps


def test_undamaged_it_goes_on_after_its_last_step(cut: Path) -> None:
    assert resume(cut) == [6, 7, 8]
    assert generations(cut / "checkpoint.pt")  # of a single run, which may go on


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = cut / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    steps = resume(cut)
    assert steps[0] in (5, 6)  # the last save is of the interrupt, at step 5 as well
    assert "checkpoint.pt cannot be read" in caplog.text


def test_rows_that_were_lost_are_taken_again(cut: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = (cut / "steps.csv").read_text().splitlines(keepends=True)
    (cut / "steps.csv").write_text("".join(rows[:3]))
    assert resume(cut) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "has rows up to step 2" in caplog.text


def test_a_row_missing_in_the_middle_is_noticed(cut: Path) -> None:
    rows = (cut / "steps.csv").read_text().splitlines(keepends=True)
    (cut / "steps.csv").write_text("".join(rows[:2] + rows[3:]))
    assert resume(cut)[0] == 1


def test_without_a_whole_checkpoint_it_says_what_to_delete(cut: Path) -> None:
    for file in (cut / "checkpoint.pt", previous(cut / "checkpoint.pt")):
        file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="delete it to start that trial again"):
        single(cut.parent, resume=True)
    for file in generations(cut / "checkpoint.pt"):
        file.unlink()
    assert resume(cut) == [1, 2, 3, 4, 5, 6, 7, 8]
