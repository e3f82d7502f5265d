"""Metrics that are not finite in a search: of one metric, of several, packed, and with Ray."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from small_problems import CONFIG, make_rare

from ift_tune import Budget, Float, MetaSpace, load_results, ray_trainable, run_study
from ift_tune.search.result import StudyResult

SPACE = MetaSpace({"meta_lr": Float(0.01, 0.1)})
QUICK = replace(CONFIG, inner_lr=0.05)
NEVER = functools.partial(make_rare, bias=-50.0)
"""A class that nothing is ever taken for."""


def searched(out: Path, factory: Any = make_rare, **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {"n_trials": 3, "config": QUICK, "device": "cpu"}
    settings |= {"sampler": "random", "out": out} | changes
    return run_study(factory, SPACE, Budget(outer_steps=5, retrain=False), **settings)


@pytest.mark.parametrize("pack", [1, 3])
def test_trials_are_judged_by_what_decides(pack: int, tmp_path: Path) -> None:
    result = searched(tmp_path, pack=pack)
    assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * 3
    steps = load_results(tmp_path).steps
    assert len(steps) == 15
    assert steps["search_precision"].isna().tolist() == ([True] * 2 + [False] * 3) * 3


def test_an_evaluation_without_what_is_optimised_besides_does_not_count(tmp_path: Path) -> None:
    result = searched(
        tmp_path, metric=["search_loss", "search_precision"], mode=["min", "max"], n_trials=2
    )
    table = load_results(tmp_path).trials
    for trial in result.study.trials:
        assert trial.state is TrialState.COMPLETE
        row = table.set_index("trial").loc[trial.number]
        assert trial.values == [row["best_value"], row["search_precision"]]
        assert row["best_step"] > 2


def test_a_trial_in_which_none_counts_has_no_values(tmp_path: Path) -> None:
    result = searched(
        tmp_path, NEVER, metric=["search_loss", "search_precision"], mode=["min", "max"], n_trials=2
    )
    assert [trial.state for trial in result.study.trials] == [TrialState.PRUNED] * 2
    trials = load_results(tmp_path).trials
    assert trials["stop_reason"].tolist() == ["nonfinite"] * 2
    assert trials["fault"].tolist() == ["no evaluation has a finite search_precision"] * 2
    assert result.failure is not None
    assert "no evaluation has a finite search_precision" in result.failure
    assert len(load_results(tmp_path).steps) == 10


def test_a_constraint_on_what_is_missing_is_violated(tmp_path: Path) -> None:
    result = searched(tmp_path, NEVER, constraints=["search_precision>=0.1"], n_trials=1)
    assert result.study.trials[0].state is TrialState.COMPLETE
    assert load_results(tmp_path).trials["feasible"].tolist() == [False]


def test_a_result_of_rays_has_no_number_for_it() -> None:
    kind = ray_trainable(NEVER, SPACE, Budget(outer_steps=2), config=QUICK, device="cpu")
    trainable: Any = kind(config={"meta_lr": 0.05})
    results = [trainable.train() for _ in range(2)]
    trainable.stop()
    assert results[-1]["stop_reason"] == "done"
    for result in results:
        assert "search_precision" not in result
        assert math.isfinite(result["objective"])
