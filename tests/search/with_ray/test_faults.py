"""A disk that is full for a trial's process, or for the driver: no trial fails, nothing is lost."""

from __future__ import annotations

import functools
import gc
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState
from small_problems import make_tiny

from ift_tune import load_results, run_study
from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.search.ray import RayResult
from with_ray.ray_problems import make_eventful_at
from with_ray.test_run_ray import RATE, Recorder, assert_same_search, common, search

N_TRIALS = 2


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size, as on a disk that fills."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        limit_files(1_000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_study(make_tiny, n_trials=N_TRIALS, out=out, **common(RATE))
    return out


@pytest.fixture
def room() -> Iterator[None]:
    yield
    limit_files(resource.RLIM_INFINITY)


def assert_whole(out: Path, result: RayResult, whole: Path) -> None:
    assert_same_search(out, whole)
    assert result.study is not None
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * N_TRIALS


def assert_interrupted(out: Path) -> None:
    assert set(load_results(out).trials["status"]) <= {"complete", "interrupted", "running"}


@pytest.mark.nightly
def test_a_full_disk_in_a_trials_process_interrupts_the_search(tmp_path: Path, whole: Path) -> None:
    out, full = tmp_path / "run", functools.partial(limit_once, tmp_path / "marker")
    factory = functools.partial(make_eventful_at, events={0.05: full})
    with pytest.raises(
        EnvironmentFaultError,
        match=r"checkpoint\.pt .* \(File too large\).*--resume",
    ) as error:
        search(out, N_TRIALS, factory, space=RATE)
    assert "\n" not in str(error.value)
    gc.collect()
    assert_interrupted(out)
    recorder = Recorder()
    result = search(out, N_TRIALS, factory, space=RATE, resume=True, callbacks=[recorder])
    assert recorder.heard[0] == (0, "started", 2)  # the third step's checkpoint had no room
    assert_whole(out, result, whole)


@pytest.mark.nightly
@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("at", [(0, 2), (1, 4)])
def test_a_full_disk_under_the_tables_interrupts_the_search(
    at: tuple[int, int], tmp_path: Path, whole: Path
) -> None:
    fill: Callable[[], None] = functools.partial(limit_files, 700)
    with pytest.raises(EnvironmentFaultError, match=r"File too large.*--resume") as error:
        search(tmp_path, N_TRIALS, make_tiny, space=RATE, callbacks=[Recorder(at, fill)])
    assert "\n" not in str(error.value)
    limit_files(resource.RLIM_INFINITY)
    gc.collect()
    assert_interrupted(tmp_path)
    result = search(tmp_path, N_TRIALS, make_tiny, space=RATE, resume=True)
    assert_whole(tmp_path, result, whole)
