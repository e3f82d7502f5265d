"""A problem that raises, and is mended: the comparison goes on as if it had never raised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparisons import (
    TRAINING_STEPS,
    assert_same_tables,
    comparison,
    make_clouds,
    run,
)

from ift_tune import MetaConfig, load_results
from ift_tune.base.status import COARSE_PREFIX, StopReason, ending
from ift_tune.compare.comparison import search_state
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.search.work import open_storage
from ift_tune.trial.tables import RunDirectory

LIMIT = 110.0
GRID_POINTS = 21
MISTAKE = "a mistake in the user's problem"


class Mistaken(ClassificationProblem):
    """Raises in the training loss after some calls."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def train_loss(self, batch: Any) -> torch.Tensor:
        self.hook()
        return super().train_loss(batch)


class FailsAt:
    """Makes the tiny problem, which raises at calls of the training loss, counted overall.

    The first is the look at the problem before anything is written.
    """

    def __init__(self, *calls: int) -> None:
        self.calls, self.made = calls, 0

    def __call__(
        self, config: MetaConfig, device: torch.device, seed: int
    ) -> ClassificationProblem:
        problem = make_clouds(config, device, seed, kind=Mistaken, weighted=True)
        assert isinstance(problem, Mistaken)
        problem.hook = self._count
        return problem

    def _count(self) -> None:
        self.made += 1
        if self.made in self.calls:
            raise RuntimeError(MISTAKE)


ARMS = ("ift+val", "ift+tpe", "loss-ranking", "random", "qmc", "tpe", "grid", "asha")
MOMENTS = {  # calls; each is of a trial that is tried again after the one before
    "first trial": (2,),
    "first trial, later": (TRAINING_STEPS - 1,),
    "a later trial": (2 * TRAINING_STEPS + 4,),
    "twice the same trial": (4, 8),
    "two trials": (2, 3 * TRAINING_STEPS),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return where an arm was run without a mistake."""
    known: dict[str, Path] = {}

    def found(arm: str) -> Path:
        if arm not in known:
            known[arm] = tmp_path_factory.mktemp("undisturbed") / "run"
            run(comparison(LIMIT, problem_factory=FailsAt()), known[arm], arm)
        return known[arm]

    return found


DAILY = [(arm, "two trials") for arm in ("ift+val", "loss-ranking", "random", "grid")]
CASES = [(arm, "two trials") for arm in ARMS]
CASES += [
    (arm, moment) for arm in ("ift+val", "grid") for moment in MOMENTS if (arm, moment) not in CASES
]


@pytest.mark.parametrize(
    ("arm", "moment"),
    [c if c in DAILY else pytest.param(*c, marks=pytest.mark.nightly) for c in CASES],
)
def test_its_tables_are_those_of_one_without_the_mistake(
    arm: str, moment: str, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    calls = MOMENTS[moment]
    whole = comparison(LIMIT, problem_factory=FailsAt(*calls))
    for number, _ in enumerate(calls):
        with pytest.raises(RuntimeError, match=MISTAKE):
            run(whole, tmp_path / "run", arm, resume=number > 0)
        assert list(load_results(tmp_path / "run").trials["status"]).count("failed") == 1
    results = run(whole, tmp_path / "run", arm, resume=True)
    assert_same_tables(results, undisturbed(arm))
    assert results.trials["gradient_equivalents"].sum() <= LIMIT * (1.0 + 1e-12)


def test_each_point_of_the_grid_is_tried_once(tmp_path: Path) -> None:
    whole = comparison(1e4, problem_factory=FailsAt(20, 50))
    for resume in (False, True):
        with pytest.raises(RuntimeError, match=MISTAKE):
            run(whole, tmp_path / "run", "grid", resume=resume)
    trials = run(whole, tmp_path / "run", "grid", resume=True).trials
    assert len(trials) == GRID_POINTS
    varied = [name for name in trials if str(name).startswith(COARSE_PREFIX)]
    assert varied
    assert not trials.duplicated(["inner_lr", *varied]).any()


# What an earlier version has left: a failed trial that the study takes for finished


@pytest.mark.parametrize("arm", ["ift+val", "loss-ranking"])
def test_a_failed_trial_is_no_groundwork(arm: str, tmp_path: Path) -> None:
    whole = comparison(LIMIT, problem_factory=FailsAt(5))
    with pytest.raises(RuntimeError, match=MISTAKE):
        run(whole, tmp_path / "run", arm)
    (cell,) = (tmp_path / "run" / "cells").iterdir()
    storage = open_storage(None, cell)
    (study,) = storage.get_all_studies()
    trial = storage.get_all_trials(study._study_id)[0]  # the others wait
    storage.set_trial_state_values(trial._trial_id, state=type(trial.state).FAIL)
    trials = run(whole, tmp_path / "run", arm, resume=True).trials
    assert list(trials["status"])[:2] == ["failed", "complete"]
    if arm == "ift+val":  # whose groundwork is no candidate
        assert list(trials["best_value"].isna())[:3] == [True, True, False]
    else:
        assert list(trials[f"{COARSE_PREFIX}dropped"] > 0.0)[:3] == [False, False, True]
    assert (RunDirectory(cell, resume=True).path / "best" / "model.pt").exists()


def test_what_failed_is_paid_for_and_counts_for_nothing_else() -> None:
    facts: dict[int, dict[str, Any]] = {
        0: {"cost": 4.0, "best_value": 0.1, **ending(StopReason.FAILED)},
        1: {"cost": 8.0, "best_value": 0.3, **ending(StopReason.DONE)},
        2: {"cost": 2.0, "best_value": 0.2, **ending(StopReason.FAILED)},
    }
    state = search_state(facts, "cost")
    assert (state.spent, state.best, state.trials, state.exhausted) == (14.0, 0.3, 1, False)
    assert search_state(facts, "cost", before=1).trials == 0
