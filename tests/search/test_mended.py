"""A mistake that ended a search, and was mended: the search goes on as if there had been none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna import samplers
from optuna.trial import FrozenTrial, TrialState
from small_problems import assert_same_tables, make_quadratic

from ift_tune import Budget, Choice, Float, Int, MetaConfig, MetaSpace, load_results, run_study
from ift_tune.search.result import StudyResult
from ift_tune.search.work import open_storage
from ift_tune.testing.problems import Quadratic
from ift_tune.trial import runner

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

COMPLETE, FAIL, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING
MISTAKE = "a mistake in the user's problem"
LAST = 6  # trials that the study shall have
POINTS = MetaSpace({"meta_lr": Choice((0.01, 0.02)), "inner_steps": Int(1, 3)})
RANGES = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True), "inner_steps": Int(1, 9)})
NIGHTLY = functools.partial(pytest.param, marks=pytest.mark.nightly)
SPACES = {
    **dict.fromkeys(["grid", "bruteforce"], POINTS),
    **dict.fromkeys(["random", "qmc", "tpe"], RANGES),
}


class Mistaken(Quadratic):
    """Raises in the third outer step."""

    calls = 0

    def val_loss(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            raise RuntimeError(MISTAKE)
        return super().val_loss(batch)


def make_mistaken(
    config: MetaConfig, device: torch.device, seed: int, *, at: dict[str, Any]
) -> Quadratic:
    """Return a problem that raises in the trial at one point."""
    flat = config.to_flat()
    hit = all(flat[name] == value for name, value in at.items())
    return Mistaken(seed=seed) if hit else make_quadratic(config, device, seed)


def study(out: Path, sampler: Any = "random", **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {
        "problem_factory": make_quadratic,
        "space": SPACES.get(sampler, RANGES) if isinstance(sampler, str) else RANGES,
        "budget": Budget(outer_steps=4, retrain=False),
        "n_trials": LAST,
        "task": "quadratic",
        "device": "cpu",
    }
    return run_study(out=out, sampler=sampler, **(settings | changes))


def trials_in(out: Path) -> list[FrozenTrial]:
    """Return what the study of a run directory knows."""
    return optuna.load_study(study_name=None, storage=open_storage(None, out)).trials


@pytest.mark.parametrize(
    "checkpoints",
    [False, NIGHTLY(True)],
    ids=["anew", "from a checkpoint"],
)
@pytest.mark.parametrize("number", [NIGHTLY(0), 3, NIGHTLY(LAST - 1)])
@pytest.mark.parametrize("sampler", SPACES)
def test_the_tables_are_those_of_a_search_without_it(
    sampler: str, number: int, checkpoints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checkpoints:
        monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    whole = study(tmp_path / "whole", sampler).study.trials
    mistaken = functools.partial(make_mistaken, at=whole[number].params)
    with pytest.raises(RuntimeError, match=MISTAKE):
        study(tmp_path / "run", sampler, problem_factory=mistaken)
    failed = load_results(tmp_path / "run").trials
    assert list(failed["status"]) == ["complete"] * number + ["failed"]
    assert trials_in(tmp_path / "run")[-1].params == whole[number].params

    mended = study(tmp_path / "run", sampler, resume=True).study.trials
    assert [t.params for t in mended] == [t.params for t in whole]
    assert [t.value for t in mended] == [t.value for t in whole]
    assert [t.intermediate_values for t in mended] == [t.intermediate_values for t in whole]
    assert [t.state for t in mended] == [COMPLETE] * LAST
    assert_same_tables(tmp_path / "run", tmp_path / "whole")


def test_a_mistake_that_is_not_mended_ends_each_call_at_the_same_trial(tmp_path: Path) -> None:
    whole = study(tmp_path / "whole").study.trials
    mistaken = functools.partial(make_mistaken, at=whole[2].params)
    for resume in (False, True, True):
        with pytest.raises(RuntimeError, match=MISTAKE):
            study(tmp_path / "run", problem_factory=mistaken, resume=resume)
        assert [t.state for t in trials_in(tmp_path / "run")] == [COMPLETE, COMPLETE, RUNNING]
    # Who knows that it is the point's fault names the exception, and the others come.
    caught = study(tmp_path / "run", problem_factory=mistaken, resume=True, catch=RuntimeError)
    assert [t.params for t in caught.study.trials] == [t.params for t in whole]
    assert [t.state for t in caught.study.trials] == [
        FAIL if t.number == 2 else COMPLETE for t in whole
    ]
    assert len(study(tmp_path / "run", resume=True).study.trials) == LAST


def test_a_point_of_the_queue_is_tried_again_and_once(tmp_path: Path) -> None:
    asked = [{"inner_steps": 7, "meta_lr": 0.05}]
    mistaken = functools.partial(make_mistaken, at=asked[0])
    with pytest.raises(RuntimeError, match=MISTAKE):
        study(tmp_path / "run", problem_factory=mistaken, enqueue=asked)
    study(tmp_path / "run", enqueue=asked, resume=True)
    study(tmp_path / "whole", enqueue=asked)
    assert_same_tables(tmp_path / "run", tmp_path / "whole")


class Lacking(samplers.RandomSampler):
    """Cannot draw the second parameter of the third trial."""

    lacks: Callable[[int], bool] = staticmethod(lambda number: number == 2)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any
    ) -> Any:
        if trial.params and self.lacks(trial.number):
            raise ModuleNotFoundError("No module named 'cmaes'")
        return super().sample_independent(study, trial, name, distribution)


def lacking(seed: int, trial_number: int) -> samplers.BaseSampler:
    return Lacking(seed=seed + trial_number)


def test_a_sampler_that_could_not_draw_costs_the_other_trials_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError, match="cmaes"):
        study(tmp_path / "run", lacking)
    monkeypatch.setattr(Lacking, "lacks", lambda self, number: False)
    study(tmp_path / "whole", lacking)
    study(tmp_path / "run", lacking, resume=True)
    mine, theirs = (trials_in(tmp_path / name) for name in ("run", "whole"))
    assert [t.state for t in mine] == [COMPLETE] * LAST
    # That trial keeps the parameter that was drawn already, and so gets another second one.
    assert [t.params for t in mine[:2] + mine[3:]] == [t.params for t in theirs[:2] + theirs[3:]]
