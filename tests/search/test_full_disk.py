"""What a full disk, a lost folder or too many open files leave: no failed trial, nothing lost."""

from __future__ import annotations

import functools
import pickle
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from processes import Running, finish
from small_problems import BUDGET, CONFIG, SPACE, assert_same_tables, comparable, make_tiny

from ift_tune import Callback, cli, load_results, run_study
from ift_tune.base.errors import EnvironmentFaultError, Interrupted
from ift_tune.base.faults import surroundings, writing
from ift_tune.search.storage_faults import mend_tail
from ift_tune.search.work import OwnJournalLock, open_storage
from ift_tune.trial.runner import run_trial
from ift_tune.trial.session import run_single
from ift_tune.trial.trial import Trial

SEARCH = (
    *("search", "digits-weight-decay", "--sampler", "random", "--n-trials", "3", "--no-baseline"),
    *("--outer-steps", "4", "--vary", "meta_lr=0.01:0.1", "--seed", "0", "--quiet"),
)
SIZES = (300, 900, 1_500, 3_000, 5_000, 9_000, 16_000, 24_000, 32_000, 48_000)
"""Bytes that a file may have: from the first one that is written to the last."""


def with_room(size: int, arguments: tuple[str, ...]) -> None:
    """Run the command line where no file may grow beyond a size, as on a disk that fills."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    sys.argv = ["ift-tune", *arguments]
    cli.main()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(*SEARCH, "--out", str(out)) == 0
    return out


def fill_and_make_room(size: int, out: Path, undisturbed: Path) -> None:
    command = (*SEARCH, "--out", str(out))
    with Running(functools.partial(with_room, size, command)) as process:
        done = process.wait()
    assert done.status == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if "go on with --resume" in line]
    assert len(lines) == 1, done.stderr
    assert "File too large" in lines[0]
    assert "Traceback" not in done.stderr
    assert finish(*command, "--resume") == 0
    for mine, theirs in zip(load_results(out), load_results(undisturbed), strict=True):
        assert set(mine["status"]) == {"complete"}
        pd.testing.assert_frame_equal(comparable(mine), comparable(theirs), check_exact=True)


@pytest.mark.parametrize("size", [pytest.param(1_500, marks=pytest.mark.nightly), 16_000])
def test_a_search_on_a_disk_that_fills_ends_in_the_undisturbed_tables(
    size: int, tmp_path: Path, undisturbed: Path
) -> None:
    fill_and_make_room(size, tmp_path / "run", undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("size", SIZES)
def test_ten_sizes_of_a_disk_that_fills(size: int, tmp_path: Path, undisturbed: Path) -> None:
    fill_and_make_room(size, tmp_path / "run", undisturbed)


def test_a_folder_that_vanishes_interrupts_a_trial_and_fails_none(tmp_path: Path) -> None:
    taken: list[int] = []

    class Lose(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            taken.append(row["step"])
            if row["step"] == 2:
                shutil.rmtree(tmp_path / "run" / "trial-00000")

    with pytest.raises(EnvironmentFaultError, match="cannot be written"):
        run_single(
            make_tiny, BUDGET, out=tmp_path / "run", config=CONFIG, device="cpu", callbacks=[Lose()]
        )
    assert taken == [1, 2]


@pytest.mark.parametrize("kind", [OSError(24, "Too many open files"), RuntimeError("...")])
def test_too_many_open_files_are_nobodys_mistake(kind: Exception) -> None:
    """PyTorch's loaders wrap the system's words in errors of their own."""

    def factory(config: Any, device: Any, seed: int) -> Any:
        raise RuntimeError("unable to open shared memory: Too many open files (24)") from kind

    with pytest.raises(EnvironmentFaultError, match="trial 3 was stopped"):
        run_trial(Trial(factory, CONFIG, BUDGET, device="cpu"), 3)


def test_other_errors_of_the_users_code_stay_what_they_are() -> None:
    for error in (FileNotFoundError(2, "No such file"), ValueError("x"), PermissionError(13, "")):
        with pytest.raises(type(error)), surroundings("it"):
            raise error
    with pytest.raises(EnvironmentFaultError), writing("a file of the run"):
        raise PermissionError(13, "not yours")


def test_a_fault_is_an_interruption_whose_message_travels() -> None:
    with pytest.raises(Interrupted) as caught, writing("a.csv"):
        raise OSError(28, "No space left on device")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert "a.csv cannot be written (No space left on device)" in str(again)


@pytest.mark.parametrize("torn", [1, 7, 40])
def test_a_journal_that_ends_in_half_a_line_goes_on(
    torn: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def study(name: str, n_trials: int, *, resume: bool = False) -> None:
        run_study(
            *(make_tiny, SPACE, BUDGET),
            n_trials=n_trials,
            out=tmp_path / name,
            config=CONFIG,
            device="cpu",
            resume=resume,
        )

    study("whole", 3)
    study("torn", 2)
    journal = tmp_path / "torn" / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"0b7c","study_id":0,'[:torn])
    study("torn", 3, resume=True)
    assert "ended in half a line" in caplog.text
    assert_same_tables(tmp_path / "torn", tmp_path / "whole")


def test_a_whole_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    for content in (b"", b"{}\n", b"{}\n" * 100_000):
        path.write_bytes(content)
        mend_tail(path, OwnJournalLock(path))
        assert path.read_bytes() == content
    path.write_bytes(b"x" * 200_000)
    mend_tail(path, OwnJournalLock(path))
    assert path.read_bytes() == b""


def test_a_journal_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b'{"op_code": 0\n{}\n')
    with pytest.raises(ValueError, match=r"study\.journal is damaged"):
        open_storage(None, tmp_path)
