"""Searches in both directions: studies, pruners, the best trial, and searches that find nothing."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from small_problems import BUDGET, CONFIG, SPACE, make_quadratic, make_tiny

from ift_tune import Budget, Choice, Float, IFTObjective, MetaSpace, UsageError, run_study
from ift_tune.base.direction import Direction
from ift_tune.search.analysis import best_row
from ift_tune.search.pruners import make_pruner
from ift_tune.search.result import StudyResult
from ift_tune.search.samplers import sampler_factory

# With the loss as what is to be maximised: the least that is learned is the best.
LOSS = "search_loss"
RATES = MetaSpace({"inner_lr": Choice((1e-4, 1e-2, 1e-1))})
DIVERGING = MetaSpace({"alpha": Float(1e6, 1e7)})


def objective(**changes: Any) -> IFTObjective:
    settings: dict[str, Any] = {"config": CONFIG, "device": "cpu"}
    return IFTObjective(make_quadratic, RATES, Budget(outer_steps=2), **(settings | changes))


def study_of(direction: Literal["minimize", "maximize"]) -> optuna.Study:
    study = optuna.create_study(direction=direction, pruner=optuna.pruners.NopPruner())
    for rate in RATES.distributions["inner_lr"].options:  # type: ignore[union-attr]
        study.enqueue_trial({"inner_lr": rate})
    return study


def searched(out: Path, n_trials: int = 3, **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {
        "space": SPACE,
        "budget": BUDGET,
        "config": CONFIG,
        "device": "cpu",
        "sampler": sampler_factory("random"),
    }
    return run_study(make_tiny, n_trials=n_trials, out=out, **(settings | changes))


@pytest.mark.parametrize(
    ("direction", "mode", "best_of"),
    [
        ("minimize", None, min),
        ("minimize", "min", min),
        ("maximize", "max", max),
        ("maximize", None, max),  # the study says it
    ],
)
def test_the_best_trial_of_a_users_study_is_best_in_its_direction(
    direction: Literal["minimize", "maximize"], mode: str | None, best_of: Any
) -> None:
    study = study_of(direction)
    study.optimize(objective(metric=LOSS, mode=mode), n_trials=3)
    values = [trial.value for trial in study.trials]
    assert len(set(values)) == 3
    assert study.best_value == best_of(values)
    assert {t.user_attrs["mode"] for t in study.trials} == {"max" if best_of is max else "min"}


@pytest.mark.parametrize(
    ("direction", "metric", "mode", "mend"),
    [
        ("minimize", LOSS, "max", "create it with direction='maximize'"),
        ("maximize", LOSS, "min", "create it with direction='minimize'"),
        ("maximize", None, None, "create it with direction='minimize'"),
        ("minimize", "search_accuracy", None, "say mode='max'"),
        ("minimize", "search_f1", None, "say mode='max'"),
    ],
)
def test_a_study_and_a_mode_that_disagree_are_refused(
    direction: Literal["minimize", "maximize"], metric: str | None, mode: str | None, mend: str
) -> None:
    study = study_of(direction)
    with pytest.raises(UsageError, match=mend):
        study.optimize(objective(metric=metric, mode=mode), n_trials=1)


@pytest.mark.parametrize("metric", [None, "search_error", "test_loss"])
def test_a_metric_that_is_not_measured_fails_and_is_not_pruned(metric: str | None) -> None:
    study = study_of("minimize")
    wrong = IFTObjective(make_blind, RATES, BUDGET, config=CONFIG, device="cpu", metric=metric)
    with pytest.raises(UsageError, match="choose a metric from search_bits"):
        study.optimize(wrong, n_trials=3)
    first, *others = (trial.state for trial in study.trials)
    assert first is TrialState.FAIL
    assert set(others) == {TrialState.WAITING}


def make_blind(*arguments: Any) -> Any:
    problem = make_quadratic(*arguments)
    plain = problem.metrics
    problem.metrics = lambda batch: {"bits": plain(batch)["loss"]}  # type: ignore[method-assign]
    return problem


@pytest.mark.parametrize(("mode", "best_of"), [("min", min), ("max", max)])
def test_a_search_finds_the_best_in_its_direction(mode: str, best_of: Any, tmp_path: Path) -> None:
    result = searched(tmp_path / "run", 4, metric=LOSS, mode=mode)
    values = list(result.trials[LOSS])
    assert result.best is not None
    assert result.best["value"] == best_of(values)
    assert result.best["trial"] == values.index(best_of(values))
    assert result.failure is None
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["metric"], run["mode"]) == (LOSS, mode)
    row = best_row(result.trials, SPACE, LOSS, Direction(mode))
    assert row is not None
    assert (row["trial"], row["value"]) == (result.best["trial"], result.best["value"])


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_a_pruner_ends_the_trials_with_the_lower_values_of_what_is_maximised(pruner: str) -> None:
    study = optuna.create_study(direction="maximize", pruner=make_pruner(pruner))
    if pruner == "median":
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=1)
    rates = (1e-4, 1e-1, 1e-1, 1e-1)  # of which the first keeps the largest loss
    for rate in rates:
        study.enqueue_trial({"inner_lr": rate})
    space = MetaSpace({"inner_lr": Choice((1e-4, 1e-1))})
    budget = Budget(outer_steps=6, retrain=False)
    aim = IFTObjective(
        make_quadratic, space, budget, config=CONFIG, device="cpu", metric=LOSS, mode="max"
    )
    study.optimize(aim, n_trials=len(rates))
    first, *others = (trial.state for trial in study.trials)
    assert first is TrialState.COMPLETE
    assert TrialState.PRUNED in others
    assert study.best_trial.number == 0


def test_a_metric_that_sounds_higher_leaves_nothing_behind_without_a_mode(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="search_accuracy sounds as if higher were better"):
        searched(tmp_path / "run", metric="search_accuracy")
    assert not (tmp_path / "run").exists()


def test_a_shared_study_of_the_other_direction_is_not_joined(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    place = {"storage": storage, "study_name": "both", "metric": LOSS}
    searched(tmp_path / "one", 1, mode="min", **place)
    with pytest.raises(UsageError, match=r"mode='min'|direction"):
        searched(tmp_path / "two", 2, mode="max", **place)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_search_that_finds_nothing_says_so(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ift_tune"):
        result = searched(
            tmp_path, 2, space=DIVERGING, budget=Budget(outer_steps=9), metric=LOSS, mode=mode
        )
    assert result.best is None
    assert result.failure is not None
    assert "no trial came to its end with a finite value (2 diverged)" in result.failure
    assert result.failure in caplog.text


def test_the_best_row_is_the_earliest_of_the_highest() -> None:
    table = pd.DataFrame(
        {
            "trial": [0, 1, 2, 3, 4],
            "status": ["complete"] * 4 + ["pruned"],
            "stop_reason": ["done"] * 4 + ["diverged"],
            "search_f1": [0.5, 0.75, 0.75, math.nan, 0.99],
            "test_f1": [0.4, 0.6, 0.7, 0.8, 0.9],
            "search_error": [0.1, 0.2, 0.3, 0.4, 0.5],
        }
    )
    best = best_row(table[::-1], SPACE, "search_f1", Direction.MAX)
    assert best is not None
    assert (best["trial"], best["value"], best["mode"], best["test_f1"]) == (1, 0.75, "max", 0.6)
