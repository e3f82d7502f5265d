"""Constraints of a search: who may be the best, in the study and in the tables."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from small_problems import CONFIG, SPACE, make_quadratic

from ift_tune import (
    Budget,
    Choice,
    ConjugateGradient,
    Float,
    IFTObjective,
    MetaSpace,
    UsageError,
    load_best,
    run_study,
)
from ift_tune.base.objectives import Objectives
from ift_tune.search.analysis import best_point, best_row
from ift_tune.search.outcomes import check_means
from ift_tune.search.result import StudyResult

BUDGET = Budget(outer_steps=2, retrain=False)
RATES = MetaSpace({"inner_lr": Float(1e-4, 0.1, log=True)})  # a larger one, a smaller loss


def searched(out: Path, n_trials: int = 6, **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {"budget": BUDGET, "config": CONFIG, "device": "cpu"}
    settings |= {"space": RATES, "sampler": "random"} | changes
    space = settings.pop("space")
    return run_study(make_quadratic, space, n_trials=n_trials, out=out, **settings)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, float]:
    """A search in which the better half of the trials violates the constraint."""
    folder = tmp_path_factory.mktemp("halved")
    moved = searched(folder / "free").trials["inner_update_norm"]
    bound = float(moved.median())
    return searched(folder / "bound", constraints=[f"inner_update_norm<={bound!r}"]), bound


def test_the_best_is_the_best_of_those_that_keep_the_bound(
    halved: tuple[StudyResult, float],
) -> None:
    result, bound = halved
    table = result.trials
    kept = table[table["inner_update_norm"] <= bound]
    assert 0 < len(kept) < len(table)
    assert kept["search_loss"].min() > table["search_loss"].min()
    best = result.best
    assert best is not None
    assert best["value"] == result.study.best_value == kept["search_loss"].min()
    assert list(table["feasible"]) == list(table["inner_update_norm"] <= bound)
    assert list(result.front["trial"]) == [best["trial"]]
    row = best_row(table, RATES, "search_loss")
    assert row is not None
    assert row["trial"] == best["trial"]


def test_each_trial_says_by_how_much_it_is_beyond(halved: tuple[StudyResult, float]) -> None:
    result, bound = halved
    moved = result.trials.set_index("trial")["inner_update_norm"]
    for trial in result.study.trials:
        (violation,) = trial.constraints.values()
        assert violation == pytest.approx(moved[trial.number] - bound)
        assert trial.user_attrs["inner_update_norm"] == moved[trial.number]


def test_where_nothing_keeps_it_there_is_no_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bounds = ["hvps<=0", "hyper_change>=1e9"]
    with caplog.at_level(logging.WARNING, "ift_tune"):
        result = searched(tmp_path, 2, constraints=bounds)
    assert result.best is None
    assert result.front.empty
    assert result.failure is not None
    assert "no trial keeps hvps<=0 and hyper_change>=1000000000" in result.failure
    assert result.failure in caplog.text
    assert best_row(result.trials, RATES, None) is None


def test_what_is_not_measured_is_not_kept_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = replace(CONFIG, inverse=ConjugateGradient(max_steps=2))
    with caplog.at_level(logging.WARNING, "ift_tune"):
        result = searched(tmp_path, 2, config=exact, constraints=["alpha_lambda_max<=2"])
    assert "trial 0 counts as one that violates alpha_lambda_max<=2" in caplog.text
    assert [trial.constraints for trial in result.study.trials] == [
        {"alpha_lambda_max<=2": 2.0}
    ] * 2
    assert not result.trials["feasible"].any()
    assert result.best is None


def test_a_trial_that_diverged_has_what_it_measured_noted(tmp_path: Path) -> None:
    space = MetaSpace({"alpha": Choice((0.01, 1e6))})
    result = searched(
        tmp_path,
        6,
        space=space,
        budget=Budget(outer_steps=9),
        constraints=["alpha_lambda_max<=2"],
        sampler="tpe",
    )
    states = {trial.state for trial in result.study.trials}
    assert states == {TrialState.PRUNED, TrialState.COMPLETE}
    for trial in result.study.trials:
        violated = trial.constraints["alpha_lambda_max<=2"] > 0.0
        assert violated == (trial.state is TrialState.PRUNED)


def test_a_pruner_works_beside_constraints(tmp_path: Path) -> None:
    pruner = optuna.pruners.PercentilePruner(1.0, n_startup_trials=1, n_warmup_steps=0)
    budget = Budget(outer_steps=4)
    result = searched(
        tmp_path, 6, budget=budget, pruner=pruner, constraints=["hvps>=0"], sampler="tpe"
    )
    assert TrialState.PRUNED in {trial.state for trial in result.study.trials}
    assert result.best is not None


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_samplers_that_heed_constraints_say_nothing(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ift_tune"):
        searched(tmp_path, 2, sampler=name, constraints=["hvps<=1000"])
    assert not caplog.records


def test_cmaes_says_that_it_does_not_heed_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objectives = Objectives.of(None, None, ["hvps<=1000"])
    with caplog.at_level(logging.WARNING, "ift_tune"):
        check_means(objectives, optuna.samplers.CmaEsSampler, optuna.pruners.NopPruner(), RATES)
    assert "CmaEsSampler does not look at constraints" in caplog.text


def test_a_resumed_search_keeps_its_constraints(tmp_path: Path) -> None:
    searched(tmp_path, 1, constraints=["hvps<=1000"])
    for other in ((), ["hvps<=999"], ["hvps<=1000", "step>=1"]):
        with pytest.raises(UsageError, match="another constraints"):
            searched(tmp_path, 2, constraints=other, resume=True)
    result = searched(tmp_path, 2, constraints=[" hvps <= 1e3 "], resume=True)
    assert len(result.trials) == 2
    assert json.loads((tmp_path / "run.json").read_text())["constraints"] == ["hvps<=1000"]


def test_a_study_of_ones_own_has_them_noted() -> None:
    aim = IFTObjective(
        make_quadratic,
        SPACE,
        BUDGET,
        config=CONFIG,
        device="cpu",
        constraints=["hvps<=9", "step>=2"],
    )
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(aim, n_trials=3)
    assert {tuple(trial.constraints) for trial in study.trials} == {("hvps<=9", "step>=2")}
    best = best_point(study)
    assert best is not None
    assert best["trial"] == study.best_trial.number


def test_a_table_without_the_column_is_read_as_before() -> None:
    table = pd.DataFrame(
        {"trial": [0, 1], "status": ["complete"] * 2, "stop_reason": ["done"] * 2}
        | {"search_error": [0.2, 0.1]}
    )
    best = best_row(table, SPACE, None)
    assert best is not None
    assert best["trial"] == 1


def test_the_model_that_is_kept_keeps_the_constraints(halved: tuple[StudyResult, float]) -> None:
    result, _ = halved
    best = result.best
    assert best is not None
    problem = best.problem  # refused if it were of another trial
    found = problem.evaluate(problem.splits.search)
    assert found["loss"] == pytest.approx(best["value"])


def test_no_model_is_kept_of_trials_that_violate_a_constraint(tmp_path: Path) -> None:
    searched(tmp_path, 2, constraints=["hvps<=0"])
    with pytest.raises(UsageError, match="keeps no trained model"):
        load_best(tmp_path, make_quadratic)
    assert not list(tmp_path.glob("trial-*/model.pt"))


def test_an_optuna_without_constraints_is_refused_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(optuna.trial.BaseTrial, "set_constraint")
    with pytest.raises(UsageError, match="pip install 'optuna>=5'"):
        searched(tmp_path / "run", constraints=["hvps<=9"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="pip install 'optuna>=5'"):
        IFTObjective(make_quadratic, SPACE, BUDGET, constraints=["hvps<=9"])
    searched(tmp_path / "run", 1)
