"""Real processes of the command line, killed in the middle and resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from small_problems import assert_same_tables, comparable

from ift_tune import cli, load_results

COMMANDS = {
    "search": ["search", "digits-weight-decay", "--backend", "optuna", "--n-trials", "3"],
    "run": ["run", "digits-weight-decay"],
}
STEPS = 12
COMMON = ["--seed", "0", "--device", "cpu", "--outer-steps", str(STEPS), "--quiet"]
WATCHED = {"search": "trial-00001", "run": "trial-00000"}
PATIENCE = 120.0


class Killed(NamedTuple):
    """A process that was sent a signal when the watched trial had some rows."""

    out: Path
    status: int
    stdout: str
    stderr: str
    before: tuple[pd.DataFrame, pd.DataFrame]


def finish(command: str, out: Path, *more: str) -> int:
    """Run a command to its end in this process."""
    arguments = ["ift-tune", *COMMANDS[command], *COMMON, "--out", str(out), *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def start_and_stop(command: str, number: signal.Signals, out: Path) -> Killed:
    """Start a process, and send it a signal in the middle of the watched trial."""
    program = [sys.executable, "-c", "from ift_tune.cli import main; main()"]
    arguments = [*COMMANDS[command], *COMMON, "--out", str(out)]
    process = subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    rows = out / WATCHED[command] / "steps.csv"
    deadline = time.monotonic() + PATIENCE
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if rows.exists() and rows.read_text().count("\n") > 3:  # a header and three rows
                process.send_signal(number)
                break
            time.sleep(0.002)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    before = load_results(out)
    return Killed(out, process.returncode, stdout, stderr, (before.trials, before.steps))


@pytest.fixture(scope="module", params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def undisturbed(command: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(command) / "undisturbed"
    assert finish(command, out) == 0
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
    assert killed.status == -signal.SIGKILL
    trials, steps = killed.before
    running = int(WATCHED[command][-1])
    assert list(trials["status"]) == ["complete"] * running + ["running"]
    assert trials["stop_reason"].iloc[:running].tolist() == ["done"] * running
    assert 3 <= len(steps[steps["trial"] == running]) < STEPS
    assert not steps.duplicated(["trial", "step"]).any()


def test_a_killed_process_is_resumed_to_the_undisturbed_tables(
    command: str, killed: Killed, undisturbed: Path
) -> None:
    assert finish(command, killed.out, "--resume") == 0
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
    assert interrupted.status == 130
    last = interrupted.stderr.splitlines()[-1]
    assert f"--out {interrupted.out} --resume" in last
    trials, steps = interrupted.before
    assert trials["status"].iloc[-1] == "interrupted"
    assert len(steps[steps["trial"] == int(WATCHED[command][-1])]) < STEPS


def test_after_ctrl_c_it_is_resumed_to_the_undisturbed_tables(
    command: str, interrupted: Killed, undisturbed: Path
) -> None:
    assert finish(command, interrupted.out, "--resume") == 0
    assert_same_tables(interrupted.out, undisturbed)


def test_quiet_prints_errors_only(killed: Killed, interrupted: Killed) -> None:
    assert (killed.stdout, killed.stderr) == ("", "")
    assert interrupted.stdout == ""
    assert len(interrupted.stderr.splitlines()) == 1
