"""Several nodes, one of them lost; a driver killed, and stopped: real processes all of them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from pathlib import Path
from random import Random

import losing_a_node
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import load_study
from processes import Running, finish, ift_tune, rows_in, wait_for
from small_problems import comparable

from ift_tune import load_results
from ift_tune.search.ray.resuming import latest_checkpoint
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.tables import RunDirectory

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


@pytest.mark.nightly
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


# Ctrl-C is a cheaper sample of the same, in with_ray.
@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
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
    resume_to_the_end(out, undisturbed)


def resume_to_the_end(out: Path, undisturbed: Path) -> None:
    """Go on, and look where: rows that were run again would have other times."""
    before = kept_rows(out)
    with ift_tune(*SEARCH, *RAY, "--out", str(out), "--resume", environment=ENVIRONMENT) as process:
        ended = process.wait()
    assert ended.status == 0, ended.stdout + ended.stderr
    for record, times in before.items():
        assert times_of(record)[: len(times)] == times
    assert_same_rows(out, undisturbed)
    assert states(out) == ["COMPLETE"] * N_TRIALS


def times_of(record: TrialRecord) -> list[float]:
    return list(record.steps()["wall_seconds"])


def kept_rows(out: Path) -> dict[TrialRecord, list[float]]:
    """Return the times in the rows up to each trial's latest checkpoint."""
    found = {}
    for record in RunDirectory(out, resume=True).records():
        step = None if (going_on := latest_checkpoint(record)) is None else going_on.step
        if step is not None or record.facts().get("status") == "complete":
            found[record] = times_of(record)[:step]
    assert found
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(6))
def test_a_driver_killed_at_random_loses_no_step_that_a_checkpoint_has(
    seed: int, undisturbed: Path, tmp_path: Path
) -> None:
    out, random = tmp_path / "run", Random(seed)
    rows, pause = random.randrange(2, N_TRIALS * STEPS - 5), 0.3 * random.random()
    with ift_tune(*SEARCH, *RAY, "--out", str(out), environment=ENVIRONMENT) as process:
        process.hit(signal.SIGKILL, lambda: rows_in(*out.glob("trial-*")) >= rows, pause)
    resume_to_the_end(out, undisturbed)


def started_by(pid: int) -> dict[int, str]:
    """Return the descendants of a process with their command lines."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = {}, [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().decode()
            todo.append(child)
    return found


def kill_one(parent: int, name: str) -> bool:
    """Kill a descendant; between two calls one that runs trials is called otherwise."""
    victims = [pid for pid, line in started_by(parent).items() if name in line]
    with contextlib.suppress(ProcessLookupError):
        for victim in victims[:1]:
            os.kill(victim, signal.SIGKILL)
            return True
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    [
        # Without which Ray's node ends as well.
        pytest.param("ray::RuntimeEnvAgent", marks=pytest.mark.nightly),
        pytest.param("/raylet/raylet", marks=pytest.mark.nightly),
        pytest.param("/gcs_server", marks=pytest.mark.nightly),
        pytest.param("ray::DashboardAgent", marks=pytest.mark.nightly),
        pytest.param("ray::ResourceTrainable", marks=pytest.mark.nightly),
    ],
)
def test_a_killed_process_of_rays_ends_the_search_in_a_sentence_or_not_at_all(
    name: str, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with ift_tune(*SEARCH, *RAY, "--out", str(out), environment=ENVIRONMENT) as process:
        wait_for(lambda: rows_in(out / "trial-00000") >= 5, "no row")
        wait_for(lambda: kill_one(process.pid, name), f"no {name}")
        killed = time.monotonic()
        ended = process.wait()
    assert time.monotonic() - killed < 60.0
    assert ended.status in (0, 1), ended.stderr
    if ended.status == 1:
        said = [line for line in ended.stderr.splitlines() if line.startswith("ift-tune: ")]
        assert "Ray's processes on this machine are gone" in said[0]
    resume_to_the_end(out, undisturbed)
