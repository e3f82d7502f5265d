"""Where `TablesCallback` writes, and that it survives what a Tuner survives."""

from __future__ import annotations

import gc
import pickle
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray import tune
from small_problems import BUDGET, CONFIG, assert_same_tensors, make_tiny

from ift_tune import load_results
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.errors import RunExistsError
from ift_tune.search.ray import TablesCallback, ray_trainable, tables
from ift_tune.search.space import Float, MetaSpace
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.tables import RunDirectory
from with_ray.ray_problems import alone, assert_same_rows, fit, without_ray

RATES = MetaSpace({"meta_lr": Float(1e-3, 0.3)})
GRID = {"meta_lr": tune.grid_search([0.05, 0.06])}


class PressCtrlC(tune.Callback):
    """Interrupts the Tuner once, after the second result of the second trial."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        at = (result["config"]["meta_lr"], result["training_iteration"])
        if at == (0.06, 2) and not self._marker.exists():
            self._marker.touch()
            signal.raise_signal(signal.SIGINT)


def make() -> Any:
    return alone(ray_trainable(make_tiny, RATES, BUDGET, config=CONFIG, device="cpu"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_ray(tmp_path_factory.mktemp("undisturbed"), [0.05, 0.06])


@pytest.mark.nightly
def test_an_interrupted_tuner_is_restored_with_its_tables(
    undisturbed: Path, tmp_path: Path
) -> None:
    press = {"callbacks": [PressCtrlC(tmp_path / "marker")]}
    fit(make(), tmp_path, GRID, reuse_actors=True, run=press)
    gc.collect()  # Ray's loggers leave files open, see conftest.py
    path = tmp_path / "ray"
    torn = load_results(path)
    assert list(torn.trials["status"]) == ["complete", "interrupted"]
    assert list(torn.trials["step"]) == [4, 2]
    moved = tmp_path / "moved"
    path.rename(moved)
    results = tune.Tuner.restore(str(moved), trainable=make()).fit()
    assert not results.errors
    assert_same_rows(moved, undisturbed, 0.05, 0.06)
    whole = load_results(moved).trials
    assert whole["run_id"].nunique() == 1
    assert whole["wall_seconds"].iloc[0] == torn.trials["wall_seconds"].iloc[0]
    assert not path.exists()


class Wanted(NamedTuple):
    """A Tuner's tables in a place of the user's choice."""

    path: Path
    callback: TablesCallback


@pytest.fixture(scope="module", params=["absolute", "relative"])
def wanted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    path = tmp_path_factory.mktemp("wanted")
    place = str(path / "tables") if request.param == "absolute" else "../tables"
    callback = TablesCallback(place, task="toy", arm="mine", run_id="one")
    fit(make(), path, {"meta_lr": 0.05}, run={"tables": callback})
    return Wanted(path, callback)


@pytest.mark.nightly
def test_the_tables_lie_where_they_were_wanted_under_their_names(
    wanted: Wanted, undisturbed: Path
) -> None:
    place = wanted.path / "tables"
    assert not list((wanted.path / "ray").glob("trial-*"))
    assert_same_rows(place, undisturbed, 0.05)
    for table in load_results(place):
        assert table[["task", "arm", "run_id"]].drop_duplicates().to_numpy().tolist() == [
            ["toy", "mine", "one"]
        ]
    assert (place / "trials.parquet").exists()


@pytest.mark.nightly
def test_a_callback_travels_without_its_files(wanted: Wanted) -> None:
    copy = pickle.loads(pickle.dumps(wanted.callback))
    before = load_results(wanted.path / "tables")
    copy.on_experiment_end([])
    assert load_results(wanted.path / "tables").trials.equals(before.trials)
    names = ("_path", "_names", "_run_id")
    assert [vars(copy)[n] for n in names] == [vars(wanted.callback)[n] for n in names]


@pytest.mark.nightly
@pytest.mark.parametrize("at_end", [False, True])
def test_lambda_as_found_is_kept_however_seldom_ray_saves(
    at_end: bool, undisturbed: Path, tmp_path: Path
) -> None:
    """A λ that is not the one of the last step would be worse than none."""
    tune.Tuner(
        make(),
        param_space={"meta_lr": 0.05},
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[TablesCallback()],
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=3, checkpoint_at_end=at_end
            ),
        ),
    ).fit()
    found = tmp_path / "ray" / "trial-00000" / "hyperparameters.pt"
    if not found.exists():
        assert not at_end
        return
    mine = load_checkpoint(found)
    theirs = load_checkpoint(undisturbed / "trial-00000" / "hyperparameters.pt")
    assert_same_tensors(list(mine.values()), list(theirs.values()))


@pytest.mark.nightly
def test_other_trainables_are_left_alone(tmp_path: Path) -> None:
    results = fit(other_trainable, tmp_path, {"x": 1.0}, run={"checkpoint_every": None})
    assert not results.errors
    assert results[0].metrics is not None
    assert results[0].metrics["objective"] == 2.0


def other_trainable(config: dict[str, Any]) -> None:
    """Be a function that knows nothing of this package."""
    tune.report({"objective": config["x"] + 1.0})


class CountingDirectory(RunDirectory):
    """Counts how often all trials' folders are looked at."""

    scans = 0

    def records(self) -> list[TrialRecord]:
        type(self).scans += 1
        return super().records()


@dataclass
class NamedTrial:
    """What of Ray's trials is looked at before their first result."""

    trial_id: str
    config: dict[str, Any]
    stopping_criterion: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("numbered", [True, False])
def test_the_folders_are_looked_at_once_however_many_trials_there_are(
    numbered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path, resume=True)
    for number in range(3):  # of before
        run.trial(number).write("ray_trial", f"old-{number}".encode())
    monkeypatch.setattr(tables, "RunDirectory", CountingDirectory)
    monkeypatch.setattr(CountingDirectory, "scans", 0)
    callback: Any = TablesCallback(tmp_path, run_id="one")
    trials = [NamedTrial(f"new-{n}", {"trial": 3 + n} if numbered else {}) for n in range(40)]
    for trial in [NamedTrial("old-1", {}), *trials]:
        callback.on_trial_start(0, [], trial)
    assert CountingDirectory.scans <= 1
    found = {r.number: (r.path / "ray_trial").read_text() for r in run.records()}
    assert found == {n: f"old-{n}" for n in range(3)} | {3 + n: f"new-{n}" for n in range(40)}


def test_a_second_experiment_does_not_mix_its_trials_in(tmp_path: Path) -> None:
    first: Any = TablesCallback(tmp_path)
    one, two = NamedTrial("one", {"trial": 0}), NamedTrial("two", {"trial": 1})
    first._run_id = "experiment"  # as Ray's storage, which these trials lack, would say
    first.on_trial_start(0, [one], one)
    first.on_trial_start(0, [one, two], two)
    before = (tmp_path / "trial-00000" / "trial.json").read_bytes()
    other: Any = TablesCallback(tmp_path)
    stranger = NamedTrial("stranger", {"trial": 0})
    with pytest.raises(RunExistsError, match="another experiment: give this one another name"):
        other.on_trial_start(0, [stranger], stranger)
    assert (tmp_path / "trial-00000" / "trial.json").read_bytes() == before
    restored: Any = TablesCallback(tmp_path)
    restored.on_trial_start(0, [one, two], two)  # a restored experiment knows its trials
