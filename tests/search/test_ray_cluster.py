"""Several nodes, one of them lost; a driver killed, and stopped: real processes all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import losing_a_node
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import load_study
from small_problems import comparable

from ift_tune import cli, load_results

PATIENCE = 180.0
STEPS = 20
N_TRIALS = 3
SEARCH = [
    *("search", "digits-weight-decay", "--sampler", "random", "--n-trials", str(N_TRIALS)),
    *("--outer-steps", str(STEPS), "--vary", "meta_lr=0.01:0.1", "--seed", "0", "--quiet"),
]
RAY = ["--backend", "ray"]
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # sockets on the loopback interface only
    "PYTHONPATH": str(Path(__file__).parent),  # for the processes of the nodes
}


def command_line(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from ift_tune.cli import main; main()"]
    return subprocess.Popen(
        [*program, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*arguments: str) -> None:
    process = command_line(*arguments)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stdout + stderr


def assert_same_rows(one: Path, other: Path) -> None:
    """Compare both tables to the bit, but for what names the backend."""
    for mine, theirs in zip(load_results(one), load_results(other), strict=True):
        assert list(mine.columns) == list(theirs.columns)
        pd.testing.assert_frame_equal(
            comparable(mine).drop(columns="run_id"),
            comparable(theirs).drop(columns="run_id"),
            check_exact=True,
        )


def states(out: Path) -> list[str]:
    storage = JournalStorage(JournalFileBackend(str(out / "study.journal")))
    return [trial.state.name for trial in load_study(study_name=None, storage=storage).trials]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same search by Optuna, in this process; random points depend on seed and number alone."""
    out = tmp_path_factory.mktemp("optuna") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ift-tune", *SEARCH, "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return out


def test_trials_of_a_lost_node_go_on_elsewhere(tmp_path: Path) -> None:
    script = losing_a_node.__file__
    done = subprocess.run(
        [sys.executable, script, str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "nodes at the end: 1" in done.stdout
    assert "states:" + losing_a_node.N_TRIALS * " COMPLETE" in done.stdout
    trials, steps = load_results(tmp_path / "run")
    assert list(trials["trial"]) == list(range(losing_a_node.N_TRIALS))
    assert set(trials["status"]) == {"complete"}
    assert not steps.duplicated(["trial", "step"]).any()
    for _, rows in steps.groupby("trial"):
        assert list(rows["step"]) == list(range(1, losing_a_node.STEPS + 1))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)]
)
def test_a_search_whose_driver_dies_can_be_resumed_to_the_undisturbed_tables(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = command_line(*SEARCH, *RAY, "--out", str(out))
    rows = out / "trial-00001" / "steps.csv"
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if rows.exists() and rows.read_text().count("\n") > 5:
            process.send_signal(number)
            break
        time.sleep(0.01)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert len(load_results(out).steps) < N_TRIALS * STEPS
    if number == signal.SIGTERM:
        assert process.returncode == 130, stderr
        assert stderr.splitlines()[-1].endswith(f"--out {out} --resume")
        return  # how it goes on is seen after Ctrl-C, in with_ray
    assert process.returncode == -signal.SIGKILL
    finish(*SEARCH, *RAY, "--out", str(out), "--resume")
    assert_same_rows(out, undisturbed)
    assert states(out) == ["COMPLETE"] * N_TRIALS
