"""Where trials go on after Ray's experiment has ended early: at their checkpoints, to the step."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from optuna.trial import TrialState
from small_problems import CONFIG, SPACE, make_tiny

from ift_tune import Budget
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.errors import Interrupted, RunExistsError, UsageError
from ift_tune.search.ray import RayResult, run_ray
from ift_tune.search.ray import settings as schedulers
from ift_tune.search.ray.resuming import experiments, latest_checkpoint, next_experiment
from ift_tune.search.samplers import sampler_factory
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.tables import RunDirectory
from with_ray.test_run_ray import Recorder, assert_same_search, press_ctrl_c

STEPS = 6


def search(out: Path, n_trials: int = 2, **changes: Any) -> RayResult:
    settings: dict[str, Any] = {
        "space": SPACE,
        "budget": Budget(outer_steps=STEPS, retrain=False),
        "config": CONFIG,
        "task": "tiny",
        "device": "cpu",
        "cpus_per_trial": 2.0,
        "sampler": sampler_factory("random"),
        "n_trials": n_trials,
    }
    return run_ray(make_tiny, out=out, **(settings | changes))


def interrupt(out: Path, at: tuple[int, int], **changes: Any) -> None:
    with pytest.raises(Interrupted):
        search(out, callbacks=[Recorder(at, press_ctrl_c)], **changes)
    gc.collect()  # Ray's loggers leave files open, see conftest.py


def rows(out: Path, number: int) -> list[int]:
    return list(RunDirectory(out, resume=True).trial(number).steps()["step"])


def checkpoints(out: Path, number: int) -> list[Path]:
    """Return the files, the latest first."""
    return sorted(out.glob(f"ray-*/trial-{number:05d}/checkpoint_*/checkpoint.pt"), reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint)["joint"]["outer_steps"])


class Interrupted2(NamedTuple):
    whole: Path
    cut: Path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Interrupted2:
    """The same search undisturbed, and interrupted in the fourth step of its second trial."""
    path = tmp_path_factory.mktemp("two")
    search(path / "whole")
    interrupt(path / "cut", (1, 4))
    return Interrupted2(path / "whole", path / "cut")


@pytest.mark.nightly
def test_a_trial_goes_on_at_the_step_of_its_checkpoint(two: Interrupted2, tmp_path: Path) -> None:
    out = Path(shutil.copytree(two.cut, tmp_path / "run"))
    step = step_of(checkpoints(out, 1)[0])
    assert 3 <= step < STEPS
    recorder = Recorder()
    result = search(out, resume=True, callbacks=[recorder])
    assert recorder.heard[0] == (1, "started", step)
    assert [what[1] for what in recorder.heard[1:-1]] == [*range(step + 1, STEPS + 1)]
    assert_same_search(out, two.whole)
    assert result.study is not None
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * 2


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.nightly
@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    damage: Callable[[Path], None],
    two: Interrupted2,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(two.cut, tmp_path / "run"))
    latest, before = checkpoints(out, 1)[:2]
    damage(latest)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "ift_tune"):
        search(out, resume=True, callbacks=[recorder])
    assert recorder.heard[0] == (1, "started", step_of(before))
    assert any(str(latest) in m and str(before) in m for m in caplog.messages)
    assert_same_search(out, two.whole)


@pytest.mark.nightly
def test_rows_that_are_gone_are_not_counted_on(
    two: Interrupted2, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(two.cut, tmp_path / "run"))
    record = RunDirectory(out, resume=True).trial(1)
    record.truncate(1)
    with caplog.at_level(logging.WARNING, "ift_tune"):
        assert latest_checkpoint(record) is None
    assert all("rows up to step 1 of the" in m for m in caplog.messages)
    assert caplog.messages[-1].endswith("the trial begins again")


@pytest.mark.nightly
def test_a_trial_whose_end_the_study_alone_knows_is_ended_in_the_tables_too(
    two: Interrupted2, tmp_path: Path
) -> None:
    """As after a kill between the study's word and the record's."""
    out = Path(shutil.copytree(two.whole, tmp_path / "run"))
    record = RunDirectory(out, resume=True).trial(0)
    record.describe(record.facts() | {"status": "running", "stop_reason": None})
    recorder = Recorder()
    result = search(out, resume=True, callbacks=[recorder])
    assert [what[:2] for what in recorder.heard] == [(0, "started"), (0, "done")]
    assert_same_search(out, two.whole)
    assert result.study is not None
    assert len(result.study.trials) == 2


@pytest.mark.nightly
def test_a_trial_whose_end_the_tables_alone_know_is_told_to_the_study(
    two: Interrupted2, tmp_path: Path
) -> None:
    """As after a kill between a record's last word and a storage that was slow."""
    out = Path(shutil.copytree(two.cut, tmp_path / "run"))
    record = RunDirectory(out, resume=True).trial(1)
    record.describe(record.facts() | {"status": "complete", "stop_reason": "done"})
    result = search(out, resume=True)
    assert result.study is not None
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * 2
    assert_same_search(out, two.whole)


@pytest.mark.nightly
def test_a_trial_that_is_lost_is_said_before_another_begins(
    two: Interrupted2, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(two.whole, tmp_path / "run"))
    shutil.rmtree(out / "trial-00001")
    with pytest.raises(UsageError, match=r"trial-00001 and trial 1 .* has no trial\.json"):
        search(out, resume=True, n_trials=3)
    assert not (out / "trial-00002").exists()


POPULATION: dict[str, Any] = {
    "scheduler": "pbt",
    "metric": "search_loss",
    "cpus_per_trial": 1.0,
    "n_trials": 3,
    "budget": Budget(outer_steps=8, retrain=False),
}


@pytest.mark.nightly
def test_a_population_goes_on_where_each_member_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedulers, "_PERTURBATIONS", 2)
    interrupt(tmp_path, (0, 5), **POPULATION)  # after the first exploit
    run = RunDirectory(tmp_path, resume=True)
    left = [n for n in range(3) if run.trial(n).facts()["status"] != "complete"]
    begun = {n: step_of(checkpoints(tmp_path, n)[0]) for n in left}
    kept = {n: run.trial(n).steps().head(begun[n]) for n in left}
    assert min(begun.values()) >= 4
    recorder = Recorder()
    result = search(tmp_path, resume=True, callbacks=[recorder], **POPULATION)
    started = {number: what[0] for number, word, *what in recorder.heard if word == "started"}
    assert started == begun
    assert list(result.trials["status"]) == ["complete"] * 3
    for number in range(3):
        assert rows(tmp_path, number) == list(range(1, 9))
    for number, earlier in kept.items():
        again = run.trial(number).steps().head(len(earlier))
        pd.testing.assert_frame_equal(again[earlier.columns], earlier)
    with pytest.raises(RunExistsError, match=r"holds a population of 3 members.*got n_trials=4"):
        search(tmp_path, resume=True, **POPULATION | {"n_trials": 4})


@pytest.mark.nightly
def test_members_that_cannot_be_known_are_refused(tmp_path: Path) -> None:
    interrupt(tmp_path, (0, 1), **POPULATION)
    population = tmp_path / "population.json"
    text = population.read_text()
    for damaged in ("{}", text.replace("meta_lr", "meta_rl"), text[:-9]):
        population.write_text(damaged)
        with pytest.raises(UsageError, match=r"population\.json is damaged"):
            search(tmp_path, resume=True, **POPULATION)
    population.unlink()
    with pytest.raises(RunExistsError, match="of an earlier version"):
        search(tmp_path, resume=True, **POPULATION)


@pytest.mark.nightly
def test_checkpoints_of_an_earlier_version_are_found(two: Interrupted2, tmp_path: Path) -> None:
    """Its folders were called as Ray calls a trial."""
    out = Path(shutil.copytree(two.cut, tmp_path / "run"))
    record = RunDirectory(out, resume=True).trial(1)
    name = (record.path / "ray_trial").read_text()
    step = step_of(checkpoints(out, 1)[0])
    (out / "ray-0" / record.path.name).rename(out / "ray-0" / name)
    found = latest_checkpoint(record)
    assert found is not None
    assert found.step == step


def test_experiments_are_counted_past_any_that_are_missing(tmp_path: Path) -> None:
    assert next_experiment(tmp_path) == "ray-0"
    for name in ("ray-10", "ray-2", "ray-x"):
        (tmp_path / name).mkdir()
    assert next_experiment(tmp_path) == "ray-11"
    assert [path.name for path in experiments(tmp_path)] == ["ray-2", "ray-10"]
    assert latest_checkpoint(TrialRecord(tmp_path / "trial-00000")) is None
