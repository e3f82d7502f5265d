"""Who ended a trial: the user's stop criterion, which leaves it done, or a scheduler."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.stopper import MaximumIterationStopper
from ray.tune.trainable.function_trainable import wrap_function
from small_problems import CONFIG, assert_same_tensors, make_tiny

from ift_tune import Budget, load_results
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.search.ray import TablesCallback, ray_function, ray_trainable
from ift_tune.search.space import Float, MetaSpace
from with_ray.ray_problems import alone, fit, metrics_of, rows_at, without_ray

RATES = MetaSpace({"meta_lr": Float(1e-3, 0.3)})
LONG, ENDED = Budget(outer_steps=50), Budget(outer_steps=3)


class Severe(FIFOScheduler):
    """Stops the trials of some `meta_lr` after so many results."""

    def __init__(self, patience: Mapping[float, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._patience = dict(patience)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        patience = self._patience.get(trial.config["meta_lr"], 99)
        over = result["training_iteration"] >= patience
        return TrialScheduler.STOP if over else TrialScheduler.CONTINUE


class Enough(tune.Stopper):
    """Stops everything after so many results of all trials."""

    def __init__(self, results: int) -> None:
        self._left = results

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._left -= 1
        return False

    def stop_all(self) -> bool:
        return self._left <= 0


def make(kind: Any = ray_trainable, **more: Any) -> Any:
    return alone(kind(make_tiny, RATES, LONG, config=CONFIG, device="cpu", **more))


def grid(*rates: float) -> dict[str, Any]:
    return {"meta_lr": tune.grid_search(list(rates))}


def endings(path: Path, column: str = "stop_reason") -> dict[float, Any]:
    trials = load_results(path / "ray").trials
    return dict(zip(trials["meta_lr"], trials[column], strict=True))


def assert_found_as_if_by_budget(path: Path, without: Path, *rates: float) -> None:
    """Compare the trials with such that were to have that length, to the bit: λ and the rows."""
    numbers = endings(path, "trial")
    for number, rate in enumerate(rates):
        mine, theirs = (rows_at(p, rate, "trials") for p in (path / "ray", without))
        assert mine["retrained_test_error"].notna().all()
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True, check_like=True)
        found = path / "ray" / f"trial-{numbers[rate]:05d}" / "hyperparameters.pt"
        expected = without / f"trial-{number:05d}" / "hyperparameters.pt"
        lambdas = [list(load_checkpoint(p).values()) for p in (found, expected)]
        assert_same_tensors(*lambdas)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    return without_ray(path, [0.05, 0.07, 0.08], budget=ENDED)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A criterion ends .05; a scheduler .06; both would end .07 with the same result."""
    path = tmp_path_factory.mktemp("both")
    results = fit(
        make(),
        path,
        grid(0.05, 0.06, 0.07),
        scheduler=Severe({0.06: 2, 0.07: 3}),
        reuse_actors=True,
        run={"stop": {"outer_step": 3}},
    )
    assert not results.errors
    said = {m["config"]["meta_lr"]: m["stop_reason"] for m in metrics_of(results)}
    assert said == endings(path)
    return path


@pytest.mark.nightly
def test_a_criterion_leaves_a_trial_done_and_a_scheduler_pruned(
    both: Path, undisturbed: Path
) -> None:
    assert endings(both) == {0.05: "done", 0.06: "pruned", 0.07: "done"}
    assert endings(both, "status") == {0.05: "complete", 0.06: "pruned", 0.07: "complete"}
    assert endings(both, "step") == {0.05: 3, 0.06: 2, 0.07: 3}
    assert_found_as_if_by_budget(both, undisturbed, 0.05, 0.07)
    assert not (both / "ray" / "trial-00001" / "hyperparameters.pt").exists()


@pytest.mark.nightly
def test_what_a_killed_driver_was_working_out_is_worked_out_when_it_is_restored(
    both: Path, undisturbed: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "ray"
    (both / "ray").rename(moved)
    try:
        folder = moved / "trial-00002"
        (folder / "hyperparameters.pt").unlink()
        (folder / "concludes_after").write_text("3")
        tune.Tuner.restore(str(moved), trainable=make()).fit()
        assert_found_as_if_by_budget(tmp_path, undisturbed, 0.05, 0.07)
        assert not (folder / "concludes_after").exists()
    finally:
        moved.rename(both / "ray")


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(lambda trial_id, result: result["training_iteration"] >= 3, id="function"),
        pytest.param(MaximumIterationStopper(3), id="stopper", marks=pytest.mark.nightly),
        pytest.param([MaximumIterationStopper(3)], id="stoppers", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.nightly
def test_stoppers_are_told_from_schedulers_for_a_function_too(
    stop: Any, undisturbed: Path, tmp_path: Path
) -> None:
    results = fit(
        make(ray_function, checkpoint_every=2),  # so that the last step has to be taken again
        tmp_path,
        grid(0.05, 0.06),
        scheduler=Severe({0.06: 2}),
        run={"stop": stop, "checkpoint_every": None},
    )
    assert not results.errors
    assert endings(tmp_path) == {0.05: "done", 0.06: "pruned"}
    assert_found_as_if_by_budget(tmp_path, undisturbed, 0.05)


@pytest.mark.nightly
def test_trials_that_are_stopped_all_at_once_are_done(undisturbed: Path, tmp_path: Path) -> None:
    results = fit(make(), tmp_path, grid(0.05, 0.06), run={"stop": Enough(3)})
    assert endings(tmp_path) == {0.05: "done"}  # the other has not begun
    assert_found_as_if_by_budget(tmp_path, undisturbed, 0.05)
    assert metrics_of(results)[0]["stop_reason"] == "done"


@pytest.mark.nightly
def test_a_time_budget_leaves_trials_done(tmp_path: Path) -> None:
    endless = ray_trainable(
        make_tiny, RATES, Budget(outer_steps=10**6), config=CONFIG, device="cpu"
    )
    fit(alone(endless), tmp_path, grid(0.05), time_budget_s=40)
    assert endings(tmp_path) == {0.05: "done"}
    assert endings(tmp_path, "retrained_test_error")[0.05] >= 0.0


@pytest.mark.nightly
def test_without_a_checkpoint_it_is_said_that_nothing_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tune.Tuner(
            make(),
            param_space={"meta_lr": 0.05},
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(tmp_path),
                stop={"training_iteration": 2},
                verbose=0,
                callbacks=[TablesCallback()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    assert "trial 0 has no checkpoint" in caplog.text
    assert endings(tmp_path) == {0.05: "done"}
    assert not list(tmp_path.rglob("hyperparameters.pt"))


@pytest.mark.parametrize("kind", [ray_trainable, ray_function], ids=["class", "function"])
def test_another_process_concludes_from_an_earlier_checkpoint(
    kind: Any, undisturbed: Path, tmp_path: Path
) -> None:
    trial: Any = ray_trainable(make_tiny, RATES, LONG, config=CONFIG, device="cpu")(
        config={"meta_lr": 0.08}
    )
    trial.train()
    saved = trial.save(str(tmp_path / "saved"))
    trial.stop()
    made = kind(make_tiny, RATES, LONG, config=CONFIG, device="cpu")
    sent = ray.cloudpickle.loads(ray.cloudpickle.dumps(made))
    classes: Any = sent if kind is ray_trainable else wrap_function(sent)
    session = classes.session_of({"meta_lr": 0.08}, trial.trial_id)
    with saved.checkpoint.as_directory() as directory:
        session.load(directory)
    found, retrained = session.conclude(3, tmp_path)
    session.close()
    assert retrained == 6
    expected = load_results(undisturbed).trials.set_index("meta_lr").loc[0.08]
    assert found["retrained_test_error"] == expected["retrained_test_error"]
    lambdas = [
        list(load_checkpoint(p / "hyperparameters.pt").values())
        for p in (tmp_path, undisturbed / "trial-00002")
    ]
    assert_same_tensors(*lambdas)
