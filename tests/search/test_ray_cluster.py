"""Several nodes, one of them lost; a driver killed, and stopped: real processes all of them."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import losing_a_node
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import load_study
from processes import Running, finish, ift_tune, rows_in
from small_problems import comparable

from ift_tune import load_results

STEPS = 20
N_TRIALS = 3
SEARCH = [
    *("search", "digits-weight-decay", "--sampler", "random", "--n-trials", str(N_TRIALS)),
    *("--outer-steps", str(STEPS), "--vary", "meta_lr=0.01:0.1", "--seed", "0", "--quiet"),
]
RAY = ["--backend", "ray"]
TESTS = str(Path(__file__).parents[1])
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # sockets on the loopback interface only
    "PYTHONPATH": os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]),  # for the nodes
}


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
    assert finish(*SEARCH, "--out", str(out)) == 0
    return out


def test_trials_of_a_lost_node_go_on_elsewhere(tmp_path: Path) -> None:
    script = functools.partial(losing_a_node.main, tmp_path / "run")
    with Running(script, ENVIRONMENT) as process:
        done = process.wait()
    assert done.status == 0, done.stderr[-5000:]
    assert "rows of the trials when a node was lost" in done.stdout
    assert "states:" + losing_a_node.N_TRIALS * " COMPLETE" in done.stdout
    trials, steps = load_results(tmp_path / "run")
    assert list(trials["trial"]) == list(range(losing_a_node.N_TRIALS))
    assert set(trials["status"]) == {"complete"}
    assert not steps.duplicated(["trial", "step"]).any()
    for _, rows in steps.groupby("trial"):
        assert list(rows["step"]) == list(range(1, losing_a_node.STEPS + 1))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        # Ctrl-C is a cheaper sample of the same, in with_ray.
        pytest.param(signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_a_search_whose_driver_dies_can_be_resumed_to_the_undisturbed_tables(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    search = [*SEARCH, *RAY, "--out", str(out)]
    with ift_tune(*search, environment=ENVIRONMENT) as process:
        ended = process.hit(number, lambda: rows_in(out / "trial-00001") >= 5)
    assert len(load_results(out).steps) < N_TRIALS * STEPS
    if number == signal.SIGTERM:
        assert ended.status == 130, ended.stderr
        assert ended.stderr.splitlines()[-1].endswith(f"--out {out} --resume")
        return  # how it goes on is seen after Ctrl-C
    assert ended.status == -signal.SIGKILL
    with ift_tune(*search, "--resume", environment=ENVIRONMENT) as process:
        ended = process.wait()
    assert ended.status == 0, ended.stdout + ended.stderr
    assert_same_rows(out, undisturbed)
    assert states(out) == ["COMPLETE"] * N_TRIALS
