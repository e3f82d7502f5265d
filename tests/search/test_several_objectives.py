"""Studies of several metrics: their values, their front, who can search for it, and mistakes."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.samplers import BaseSampler
from optuna.trial import FixedTrial, TrialState
from small_problems import (
    BUDGET,
    CONFIG,
    SPACE,
    make_quadratic,
    make_tiny,
)

from ift_tune import (
    Budget,
    Choice,
    ConjugateGradient,
    Float,
    IFTObjective,
    Int,
    MetaSpace,
    UsageError,
    load_results,
    run_study,
)
from ift_tune.base.errors import RunExistsError
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.joint import JointOptimizer
from ift_tune.search.result import StudyResult
from ift_tune.search.samplers import sampler_factory, trial_seed
from ift_tune.trial.tables import RunDirectory

COST = "gradient_equivalents"
METRICS = ["search_loss", COST]
SHORT = Budget(outer_steps=2, retrain=False)


def searched(out: Path, n_trials: int = 5, **changes: Any) -> StudyResult:
    settings: dict[str, Any] = {
        "space": SPACE,
        "budget": BUDGET,
        "config": CONFIG,
        "device": "cpu",
        "metric": METRICS,
        "sampler": sampler_factory("random"),
    }
    factory = changes.pop("factory", make_tiny)
    return run_study(factory, n_trials=n_trials, out=out, **(settings | changes))


def objective(**changes: Any) -> IFTObjective:
    settings: dict[str, Any] = {"config": CONFIG, "device": "cpu", "metric": METRICS}
    return IFTObjective(make_tiny, SPACE, SHORT, **(settings | changes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return searched(tmp_path_factory.mktemp("undisturbed") / "run")


def test_a_trial_has_the_values_of_its_row(undisturbed: StudyResult) -> None:
    table = undisturbed.trials.set_index("trial")
    assert undisturbed.study.metric_names == METRICS
    for trial in undisturbed.study.trials:
        assert trial.state is TrialState.COMPLETE
        assert trial.values == [table.loc[trial.number, name] for name in METRICS]
        assert trial.user_attrs[COST] == trial.values[1]


def test_the_front_is_optunas_and_the_tables(undisturbed: StudyResult) -> None:
    trials, front = undisturbed.trials, undisturbed.front
    optunas = sorted(trial.number for trial in undisturbed.study.best_trials)
    assert sorted(front["trial"]) == optunas == list(trials.loc[trials["pareto"], "trial"])
    assert 1 <= len(front) < len(trials)
    assert list(front) == ["trial", *METRICS, *SPACE.distributions]
    assert list(front["search_loss"]) == sorted(front["search_loss"])
    assert undisturbed.failure is None


def test_the_best_is_that_of_the_first_metric_and_on_the_front(undisturbed: StudyResult) -> None:
    best, first = undisturbed.best, undisturbed.front.iloc[0]
    assert best is not None
    assert best["trial"] == first["trial"]
    assert best["value"] == min(undisturbed.trials["search_loss"])
    assert best["values"] == {name: first[name] for name in METRICS}
    assert json.loads(json.dumps(best, allow_nan=False)) == best


def test_the_model_that_is_kept_is_the_bests(undisturbed: StudyResult) -> None:
    best = undisturbed.best
    assert best is not None
    assert isinstance(best.problem.model, torch.nn.Module)  # refused if it were another trial's


def test_of_models_that_are_equal_by_the_first_metric_the_others_decide(tmp_path: Path) -> None:
    space = MetaSpace({"inner_steps": Int(1, 6)})
    result = searched(
        tmp_path,
        5,
        space=space,
        metric=["search_classes", COST],
        factory=make_counted,
        budget=SHORT,
    )
    assert set(result.trials["search_classes"]) == {3.0}
    best = result.best
    assert best is not None
    assert best["trial"] == result.trials[COST].idxmin() != 0
    assert best.problem is not None
    assert result.front["trial"].iloc[0] == best["trial"]


def make_counted(*arguments: Any) -> Any:
    problem = make_tiny(*arguments)
    problem.metrics = lambda batch: {"classes": torch.tensor(3.0)}  # type: ignore[method-assign]
    return problem


def test_a_resumed_study_is_the_undisturbed_one(undisturbed: StudyResult, tmp_path: Path) -> None:
    searched(tmp_path / "run", 2)
    with pytest.raises(UsageError, match="another objectives"):
        searched(tmp_path / "run", 5, metric=["search_loss", "hvps"], resume=True)
    with pytest.raises(UsageError, match="another objectives"):
        searched(tmp_path / "run", 5, metric="search_loss", resume=True)
    resumed = searched(tmp_path / "run", 5, resume=True)
    assert resumed.front.equals(undisturbed.front)
    assert list(resumed.trials["pareto"]) == list(undisturbed.trials["pareto"])


def test_two_workers_find_the_same_front(undisturbed: StudyResult, tmp_path: Path) -> None:
    shared = searched(tmp_path / "run", workers=2)
    assert shared.front.equals(undisturbed.front)
    assert list(shared.trials["pareto"]) == list(undisturbed.trials["pareto"])


def test_only_a_run_with_the_same_objectives_joins(tmp_path: Path) -> None:
    place = {"storage": f"sqlite:///{tmp_path / 's.db'}", "study_name": "one", "budget": SHORT}
    searched(tmp_path / "first", 1, **place)
    others: list[dict[str, Any]] = [
        {"metric": ["search_loss", "hvps"]},
        {"metric": ["search_error", COST]},
        {"metric": [*METRICS, "hvps"]},
        {"mode": ["min", "max"]},
        {"metric": "search_loss"},
        {"constraints": ["hvps<=1000"]},
    ]
    for changes in others:
        with pytest.raises(UsageError):
            searched(tmp_path / "second", 2, **(place | changes))
        assert not (tmp_path / "second").exists()
    assert len(searched(tmp_path / "third", 2, **place).front) >= 1
    assert set(load_results(tmp_path / "third").trials["trial"]) == {1}


def genetic(kind: Any, seed: int, number: int) -> BaseSampler:
    made: BaseSampler = kind(population_size=2, seed=trial_seed(seed, number))
    return made


@pytest.mark.parametrize(
    "sampler",
    [
        "tpe",
        "random",
        "qmc",
        pytest.param(functools.partial(genetic, optuna.samplers.NSGAIISampler), id="NSGAIISampler"),
        pytest.param(
            functools.partial(genetic, optuna.samplers.NSGAIIISampler), id="NSGAIIISampler"
        ),
        pytest.param("gp", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_walk_through_several_objectives(
    sampler: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = MetaSpace({"inner_steps": Int(1, 6), "alpha": Float(0.01, 0.4)})
    bounds = ["alpha_lambda_max<=0.5"]
    with caplog.at_level(logging.WARNING, "ift_tune"):
        result = searched(
            tmp_path,
            8,
            factory=make_quadratic,
            space=space,
            budget=SHORT,
            metric=["search_loss", COST],
            sampler=sampler,
            constraints=bounds,
        )
    assert {trial.state for trial in result.study.trials} == {TrialState.COMPLETE}
    table = result.trials.set_index("trial")
    measured = table["alpha_lambda_max"].astype(float)
    for trial in result.study.trials:
        assert list(trial.constraints) == bounds
        kept = measured[trial.number] <= 0.5
        assert all(kept == (value <= 0.0) for value in trial.constraints.values())
    front = {trial.number for trial in result.study.best_trials}
    assert set(table.index[table["pareto"]]) == set(result.front["trial"]) == front
    assert ("does not look at constraints" in caplog.text) == (sampler in ("random", "qmc"))


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"mode": "min"}, "give 2 in the order"),
        ({"mode": ["min"] * 3}, "got 3 for"),
        ({"metric": ["search_error", "search_error"]}, "optimised once"),
        ({"metric": ["search_error", "search_eror"]}, "did you mean 'search_error'"),
        ({"metric": ["search_error", "cost"]}, "trials do not measure 'cost'; known: "),
        ({"metric": [COST, "search_error"]}, "the first has to be one of these"),
        ({"metric": ["search_error", "test_error"]}, "only reported"),
        ({"metric": ["search_error", "peak_memory_bytes"]}, "do not measure 'peak_memory_bytes'"),
        ({"metric": ["search_error", "solve_status"]}, "do not measure 'solve_status'"),
        ({"constraints": ["alpha_lambda<=2"]}, "did you mean 'alpha_lambda_max'"),
        ({"constraints": ["alpha_lambda_max<2"]}, "COLUMN<=NUMBER"),
        ({"pruner": "median"}, "leave the pruner out.*got MedianPruner"),
        ({"pruner": optuna.pruners.HyperbandPruner()}, "got HyperbandPruner"),
        ({"sampler": "cmaes"}, "cannot draw for several metrics.*got CmaEsSampler"),
    ],
)
def test_mistakes_leave_nothing_behind(changes: dict[str, Any], mend: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=mend):
        searched(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_trials_that_diverge_are_pruned_and_on_no_front(tmp_path: Path) -> None:
    space = MetaSpace({"alpha": Choice((0.1, 1e7))})
    result = searched(
        tmp_path, 6, space=space, budget=Budget(outer_steps=9), sampler=sampler_factory("tpe")
    )
    for trial in result.study.trials:
        diverged = trial.params["alpha"] > 1.0
        assert trial.state is (TrialState.PRUNED if diverged else TrialState.COMPLETE)
        assert (trial.values is None) == diverged
    assert {"complete", "pruned"} == set(result.trials["status"])
    assert not result.trials.loc[result.trials["status"] == "pruned", "pareto"].any()


def test_without_a_complete_trial_there_is_no_front(tmp_path: Path) -> None:
    space = MetaSpace({"alpha": Float(1e6, 1e7)})
    result = searched(tmp_path, 2, space=space, budget=Budget(outer_steps=9))
    assert result.best is None
    assert "2 diverged" in str(result.failure)
    assert list(result.front) == ["trial", *METRICS]
    assert result.front.empty


class Counts(Callback):
    """Adds a column of its own."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, Any]) -> None:
        metrics["weights_moved"] = float(10 * joint.inner_steps)


def test_a_column_of_a_callback_can_be_optimised(tmp_path: Path) -> None:
    result = searched(
        tmp_path, 3, metric=["search_error", "weights_moved"], callbacks=[Counts()], budget=SHORT
    )
    steps = result.trials["inner_steps"].astype(float)
    assert [trial.values[1] for trial in result.study.trials] == list(20.0 * steps)


def test_what_one_trial_does_not_measure_cannot_be_optimised(tmp_path: Path) -> None:
    exact = replace(CONFIG, inverse=ConjugateGradient(max_steps=2))
    space = MetaSpace({"meta_lr": Float(0.01, 0.1)})
    with pytest.raises(UsageError, match="than alpha_lambda_max, got a trial that has not"):
        searched(
            tmp_path,
            config=exact,
            space=space,
            budget=SHORT,
            metric=["search_error", "alpha_lambda_max"],
        )


def test_a_study_of_ones_own_and_its_directions() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])  # with Optuna's own pruner
    study.optimize(objective(), n_trials=2)
    assert [len(trial.values) for trial in study.trials] == [2, 2]
    assert study.metric_names == METRICS
    study = optuna.create_study(directions=["maximize", "minimize"])
    aim = objective(metric=["search_accuracy_like_acc", COST])
    with pytest.raises(UsageError, match="is not measured"):  # the study says that it is maximised
        study.optimize(aim, n_trials=1)


@pytest.mark.parametrize(
    ("directions", "changes", "mend"),
    [
        (["minimize"], {}, "create the study with directions=\\['minimize', 'minimize'\\]"),
        (["minimize"] * 3, {}, "got 3 directions"),
        (["minimize"] * 2, {"metric": "search_error"}, "a trial has one value"),
        (["minimize", "maximize"], {"mode": ["min", "min"]}, "with mode=\\['min', 'min'\\]"),
        (["minimize"] * 2, {"mode": ["max", "min"]}, "has to maximize and minimize"),
        (["minimize"] * 2, {"metric": ["search_error", "no"]}, "do not measure 'no'"),
    ],
)
def test_a_study_of_ones_own_that_does_not_fit_is_refused_before_anything_is_written(
    directions: Any, changes: dict[str, Any], mend: str, tmp_path: Path
) -> None:
    study = optuna.create_study(directions=directions)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UsageError, match=mend):
        study.optimize(objective(run=run, **changes), n_trials=1)
    assert not (tmp_path / "run").exists()
    assert study.user_attrs == {}


def test_a_fixed_trial_returns_all_values() -> None:
    trial = FixedTrial({"alpha": 0.1, "meta_lr": 0.1, "inner_steps": 2})
    values = objective(constraints=["hvps<=3"])(trial)
    assert isinstance(values, tuple)
    assert values[1] > 0.0
    assert trial.constraints["hvps<=3"] == trial.user_attrs["hvps"] - 3.0


def test_a_directory_that_holds_a_run_is_refused_as_ever(
    undisturbed: StudyResult, tmp_path: Path
) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(RunExistsError):
        searched(tmp_path)
