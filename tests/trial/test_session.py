"""One session of a run: reading makes nothing, a refused call leaves nothing, the next one goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finish
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import MetaConfig, UsageError, load_results
from ift_tune.base.errors import DataNotFoundError, MissingDependencyError, RunExistsError
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.report import draw_pictures
from ift_tune.search.study import run_study
from ift_tune.trial.session import Session, run_single
from ift_tune.trial.tables import RunDirectory, load_views

SETTINGS = {"task": "toy", "seed": 0}


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Reading


@pytest.mark.parametrize("read", [load_results, load_views, draw_pictures])
@pytest.mark.parametrize("name", ["typo", "deep/typo", "empty"])
def test_reading_what_is_not_there_is_refused_and_makes_nothing(
    read: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"{name} holds no run"):
        read(tmp_path / name)
    assert everything_in(tmp_path) == ["empty"]


def test_a_report_of_what_is_not_there_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish("report", str(tmp_path / "typo")) == 2
    assert "holds no run" in capsys.readouterr().err
    assert everything_in(tmp_path) == []


def test_looking_at_a_run_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    for resume in (False, True):
        run = RunDirectory(tmp_path / "run", resume=resume)
        assert run.records() == []
        assert run.trial(3).facts() == {}
        assert run.trial(3).steps().empty
        assert run.extended({"seeds": [1]}) == {"seeds": [1]}
        run.check(SETTINGS)
    assert everything_in(tmp_path) == []


# Refusing


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [UsageError, DataNotFoundError, MissingDependencyError])
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_call_that_is_refused_before_its_first_trial_leaves_nothing(
    when: str, error: type[Exception], there: bool, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "run"
    if there:
        out.mkdir(parents=True)
    before = everything_in(tmp_path)

    def complain() -> None:
        raise error("not so")

    def begin() -> None:
        with Session(out, SETTINGS, resume=False).writing(complain if when == "before" else None):
            (out / "study.journal").write_text("begun")
            complain()

    with pytest.raises(error, match="not so"):
        begin()
    assert everything_in(tmp_path) == before
    with Session(out, {**SETTINGS, "seed": 1}, resume=False).writing():
        pass  # the corrected one


def test_what_somebody_has_put_beside_it_stays(tmp_path: Path) -> None:
    def put_something_beside_it() -> None:
        with Session(tmp_path / "deep" / "run", SETTINGS, resume=False).writing():
            (tmp_path / "deep" / "mine").touch()
            raise UsageError

    with pytest.raises(UsageError):
        put_something_beside_it()
    assert everything_in(tmp_path) == ["deep", "deep/mine"]


@pytest.mark.parametrize(("error", "trial"), [(UsageError, True), (RuntimeError, False)])
def test_what_is_no_refusal_keeps_the_run(
    error: type[Exception], trial: bool, tmp_path: Path
) -> None:
    session = Session(tmp_path / "run", SETTINGS, resume=False)

    def fail() -> None:
        with session.writing():
            if trial:
                session.run.trial(0).describe({"status": "failed"})
            raise error

    with pytest.raises(error):
        fail()
    assert "run/run.json" in everything_in(tmp_path)
    assert "run/trials.parquet" in everything_in(tmp_path)


def test_a_refused_resumption_leaves_the_run(tmp_path: Path) -> None:
    run_single(make_tiny, BUDGET, out=tmp_path, config=CONFIG, device="cpu")
    before = everything_in(tmp_path)
    with pytest.raises(UsageError, match="begun with another seed"):
        run_single(
            make_tiny, BUDGET, out=tmp_path, config=CONFIG, device="cpu", seed=1, resume=True
        )
    assert everything_in(tmp_path) == before


def make_without_data(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    raise DataNotFoundError("there are no pictures")


@pytest.mark.parametrize(
    "wrong",
    [
        {"storage": "nosuch://place"},
        {"problem_factory": make_without_data},
        {"metric": "search_nothing"},
        {"device": "cuda:7"},
        {"n_trials": 0},
        {"workers": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_corrected_study_is_not_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    call: dict[str, Any] = {
        "problem_factory": make_tiny,
        "space": SPACE,
        "budget": BUDGET,
        "n_trials": 1,
        "out": tmp_path / "deep" / "run",
        "config": CONFIG,
        "device": "cpu",
    }
    with pytest.raises(UsageError):
        run_study(**(call | wrong))
    assert everything_in(tmp_path) == []
    assert len(run_study(**call).trials) == 1


def test_a_corrected_single_run_is_not_refused(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    for factory, metric in ((make_without_data, None), (make_tiny, "search_nothing")):
        with pytest.raises(UsageError):
            run_single(factory, BUDGET, out=out, config=CONFIG, device="cpu", metric=metric)
    assert everything_in(tmp_path) == []
    assert run_single(make_tiny, BUDGET, out=out, config=CONFIG, device="cpu").value is not None


# Writing


def test_a_directory_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    first = Session(tmp_path / "run", SETTINGS, resume=False)
    second = Session(tmp_path / "run", SETTINGS, resume=False)  # at the same moment
    with first.writing():
        before = everything_in(tmp_path)
        with pytest.raises(RunExistsError, match="another process"), second.writing():
            pass
        assert everything_in(tmp_path) == before


def test_lists_grow_from_session_to_session(tmp_path: Path) -> None:
    for seeds, expected in (([0, 1], [0, 1]), ([1, 5], [0, 1, 5])):
        session = Session(tmp_path, SETTINGS, resume=True, extent={"seeds": seeds})
        with session.writing():
            assert session.extent == {"seeds": expected}
            assert session.run_id.startswith("toy-")


def test_ctrl_c_is_noted_and_the_tables_are_written_all_the_same(tmp_path: Path) -> None:
    session = Session(tmp_path, SETTINGS, resume=False)
    before = signal.getsignal(signal.SIGINT)
    with session.writing():
        assert not session.interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert session.interrupt.requested
    assert signal.getsignal(signal.SIGINT) is before
    assert len(session.tables.trials) == 0
    assert (tmp_path / "steps.csv").exists()
