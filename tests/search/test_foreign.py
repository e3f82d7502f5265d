"""Studies that were brought here: none that a sampler would unpickle is gone on with."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, CmaEsSampler
from processes import finish
from small_problems import make_tiny

from ift_tune import Budget, Float, MetaConfig, MetaSpace, UsageError, run_study
from ift_tune.search.foreign import holds_pickles

SPACE = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True), "inner_lr": Float(0.01, 0.1)})


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def search(out: Path, n_trials: int, sampler: Any = "cmaes", **changes: Any) -> optuna.Study:
    budget = Budget(outer_steps=1, retrain=False)
    config = MetaConfig(inner_steps=1, start_check=False)
    settings = {"config": config, "device": "cpu", "sampler": sampler, **changes}
    return run_study(make_tiny, SPACE, budget, n_trials=n_trials, out=out, **settings).study


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def plant(journal: Path, planted: Path, key: str = "cma:optimizer:0") -> None:
    """Put a pickle into the last trial of a journal, as CMA-ES does."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    last = max(line["trial_id"] for line in lines if "trial_id" in line)
    state = pickle.dumps(Touch(planted)).hex()
    entry = {"op_code": 9, "worker_id": "x", "trial_id": last, "system_attr": {key: state}}
    end = next(n for n, line in enumerate(lines) if line.get("trial_id") == last)
    text = json.dumps(entry).replace("optimizer", "optimi\\u007aer")  # the same in JSON
    whole = [json.dumps(line) for line in lines]
    journal.write_text("\n".join([*whole[:end], text, *whole[end:]]) + "\n")


@pytest.mark.parametrize("sampler", ["cmaes", CmaEsSampler()], ids=["name", "own"])
def test_a_study_of_ones_own_goes_on(sampler: str | BaseSampler, tmp_path: Path) -> None:
    study = search(tmp_path / "run", 8, sampler)
    assert holds_pickles(study)
    assert len(search(tmp_path / "run", 9, sampler, resume=True).trials) == 9


@pytest.mark.parametrize("with_signature", [True, False])
def test_a_study_that_was_brought_here_is_not_run(with_signature: bool, tmp_path: Path) -> None:
    search(tmp_path / "theirs", 3)
    brought = Path(shutil.copytree(tmp_path / "theirs", tmp_path / "brought"))
    if not with_signature:
        (brought / "signature").unlink()
    plant(brought / "study.journal", tmp_path / "planted")
    with pytest.raises(UsageError, match="add --trust"):
        search(brought, 5, resume=True)
    assert not (tmp_path / "planted").exists()
    search(brought, 5, resume=True, trust=True)  # the user has said so: what it holds is run
    assert (tmp_path / "planted").exists()


def test_a_study_without_pickles_needs_no_trust(tmp_path: Path) -> None:
    search(tmp_path / "run", 2, "tpe")
    brought = Path(shutil.copytree(tmp_path / "run", tmp_path / "brought"))
    (brought / "signature").unlink()
    assert len(search(brought, 3, "tpe", resume=True).trials) == 3


def test_trust_is_given_once(tmp_path: Path) -> None:
    search(tmp_path / "run", 7)
    brought = Path(shutil.copytree(tmp_path / "run", tmp_path / "brought"))
    search(brought, 8, resume=True, trust=True)
    assert len(search(brought, 9, resume=True).trials) == 9


def test_a_storage_that_was_brought_here_is_not_joined(tmp_path: Path) -> None:
    """Nor is one in a place where another lay."""
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    named = {"storage": url, "study_name": "a study"}
    search(tmp_path / "run", 7, **named)
    search(tmp_path / "again", 8, **named)  # of the same user
    brought = {**named, "storage": f"sqlite:///{tmp_path / 'brought.db'}"}
    shutil.copy(tmp_path / "mine.db", tmp_path / "brought.db")
    with pytest.raises(UsageError, match="the study 'a study' in the storage holds pickled"):
        search(tmp_path / "joined", 9, **brought)
    assert not (tmp_path / "joined").exists()
    assert len(search(tmp_path / "joined", 9, **brought, trust=True).trials) == 9


def test_a_comparison_that_was_brought_here_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *("compare", "digits-weight-decay", "--arms", "random", "--seeds", "1", "--quiet"),
        *("--budget", "40", "--training-steps", "5", "--set", "inner_steps=1"),
    ]
    assert finish(*command, "--out", str(tmp_path / "run")) == 0
    brought = Path(shutil.copytree(tmp_path / "run", tmp_path / "brought"))
    (cell,) = (brought / "cells").iterdir()
    (cell / "finished").unlink()
    plant(cell / "study.journal", tmp_path / "planted", "sepcma:optimizer:0")
    capsys.readouterr()
    assert finish(*command, "--out", str(brought), "--resume") == 2
    assert "--trust" in capsys.readouterr().err
    assert finish(*command, "--out", str(brought), "--resume", "--trust") == 0
