"""Real processes of the command line, killed in the middle and resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from processes import Ended, finish, ift_tune, rows_in
from small_problems import assert_same_tables, comparable

from ift_tune import load_results
from ift_tune.trial.tables import Results

COMMANDS = {
    "search": ["search", "digits-weight-decay", "--backend", "optuna", "--n-trials", "3"],
    "run": ["run", "digits-weight-decay"],
}
STEPS = 12
COMMON = ["--seed", "0", "--device", "cpu", "--outer-steps", str(STEPS), "--quiet"]
WATCHED = {"search": "trial-00001", "run": "trial-00000"}


class Killed(NamedTuple):
    """A process that was sent a signal when the watched trial had some rows."""

    out: Path
    ended: Ended
    before: Results


def arguments(command: str, out: Path) -> list[str]:
    return [*COMMANDS[command], *COMMON, "--out", str(out)]


def start_and_stop(command: str, number: signal.Signals, out: Path) -> Killed:
    """Start a process, and send it a signal in the middle of the watched trial."""
    with ift_tune(*arguments(command, out)) as process:
        ended = process.hit(number, lambda: rows_in(out / WATCHED[command]) >= 3)
    return Killed(out, ended, load_results(out))


@pytest.fixture(scope="module", params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def undisturbed(command: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(command) / "undisturbed"
    assert finish(*arguments(command, out)) == 0
    return out


@pytest.fixture(scope="module")
def killed(command: str, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    out = tmp_path_factory.mktemp(command) / "killed"
    return start_and_stop(command, signal.SIGKILL, out)


@pytest.fixture(scope="module")
def interrupted(command: str, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    out = tmp_path_factory.mktemp(command) / "interrupted"
    return start_and_stop(command, signal.SIGINT, out)


def test_a_killed_process_leaves_tables_that_load(command: str, killed: Killed) -> None:
    assert killed.ended.status == -signal.SIGKILL
    trials, steps = killed.before
    running = int(WATCHED[command][-1])
    assert list(trials["status"]) == ["complete"] * running + ["running"]
    assert trials["stop_reason"].iloc[:running].tolist() == ["done"] * running
    assert 3 <= len(steps[steps["trial"] == running]) < STEPS
    assert not steps.duplicated(["trial", "step"]).any()


def test_a_killed_process_is_resumed_to_the_undisturbed_tables(
    command: str, killed: Killed, undisturbed: Path
) -> None:
    assert finish(*arguments(command, killed.out), "--resume") == 0
    after = load_results(killed.out)
    assert len(after.trials) == (3 if command == "search" else 1)
    assert set(after.trials["stop_reason"]) == {"done"}
    finished = killed.before[1]["status"] == "complete"
    old = killed.before[1][finished].reset_index(drop=True)
    new = after.steps.head(len(old))
    assert (old["wall_seconds"] == new["wall_seconds"]).all()  # the very rows, not done again
    new = new[list(old.columns)]
    pd.testing.assert_frame_equal(comparable(old), comparable(new), check_dtype=False)
    assert_same_tables(killed.out, undisturbed)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(command: str, interrupted: Killed) -> None:
    assert interrupted.ended.status == 130
    last = interrupted.ended.stderr.splitlines()[-1]
    assert f"--out {interrupted.out} --resume" in last
    trials, steps = interrupted.before
    assert trials["status"].iloc[-1] == "interrupted"
    assert len(steps[steps["trial"] == int(WATCHED[command][-1])]) < STEPS


def test_after_ctrl_c_it_is_resumed_to_the_undisturbed_tables(
    command: str, interrupted: Killed, undisturbed: Path
) -> None:
    assert finish(*arguments(command, interrupted.out), "--resume") == 0
    assert_same_tables(interrupted.out, undisturbed)


def test_quiet_prints_errors_only(killed: Killed, interrupted: Killed) -> None:
    assert (killed.ended.stdout, killed.ended.stderr) == ("", "")
    assert interrupted.ended.stdout == ""
    assert len(interrupted.ended.stderr.splitlines()) == 1
