"""The trainables: what they need, what their results hold, and that each trial stands alone."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.tune.utils import validate_save_restore
from small_problems import BUDGET, CONFIG, SPACE, make_faulty, make_quadratic, make_tiny

from ift_tune import Budget, UsageError
from ift_tune.base.direction import Direction
from ift_tune.search.ray import DivergenceStopper, IFTTrainable, ray_function, ray_trainable
from ift_tune.search.space import Choice, Float, MetaSpace
from ift_tune.trial.trial import ProblemFactory
from with_ray.ray_problems import (
    AT,
    alone,
    assert_same_rows,
    faulty,
    fit,
    make_eventful_at,
    metrics_of,
    run_out_of_memory,
    without_ray,
)

COMMON: dict[str, Any] = {
    "problem_factory": make_tiny,
    "budget": BUDGET,
    "base_config": CONFIG,
    "device": "cpu",
}
RATES = MetaSpace({"meta_lr": Float(1e-3, 0.3)})
ADDED_BY_RAY = {"config", "hostname", "node_ip", "date", "trial_id", "experiment_tag"}


def results_of(trainable: Any) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    while not results or not results[-1]["done"]:
        results.append(trainable.train())
        assert len(results) < 30
    return results


def make(factory: ProblemFactory, budget: Budget = BUDGET, **changes: Any) -> type[IFTTrainable]:
    return ray_trainable(factory, RATES, budget, config=CONFIG, device="cpu", **changes)


@pytest.mark.nightly
def test_a_trainable_is_saved_and_restored_as_ray_wants_it() -> None:
    validate_save_restore(make(make_tiny), config=AT)


def test_weights_begin_anew_after_a_restoration_as_without(tmp_path: Path) -> None:
    config = CONFIG.updated({"reinit_every": 2, "signal_every": 2})
    budget = Budget(outer_steps=6, retrain=False)
    kind = ray_trainable(make_tiny, RATES, budget, config=config, device="cpu")
    whole = results_of(kind(config=AT))
    begun, later = kind(config=AT), kind(config=AT)
    for _ in range(3):
        begun.train()  # type: ignore[no-untyped-call]
    later.restore(begun.save(str(tmp_path)))
    rest = results_of(later)
    for name in ("train_loss", "search_loss", "hypergradient_norm", "gradient_equivalents"):
        assert [row[name] for row in rest] == [row[name] for row in whole[3:]]
    kept = results_of(make(make_tiny)(config=AT))
    assert [row["train_loss"] for row in kept[:2]] == [row["train_loss"] for row in whole[:2]]
    assert kept[2]["train_loss"] != whole[2]["train_loss"]  # of other weights


def test_with_all_in_the_configuration_too(tmp_path: Path) -> None:
    """With configurations as other processes get them."""
    one, other = (
        IFTTrainable(config=ray.cloudpickle.loads(ray.cloudpickle.dumps(COMMON | AT)))
        for _ in range(2)
    )
    saver: Any = one
    loader: Any = other
    for _ in range(3):
        saver.train()
    loader.restore(saver.save(str(tmp_path)))
    mine, theirs = loader.train(), saver.train()
    assert mine["training_iteration"] == theirs["training_iteration"] == 4
    assert mine["search_loss"] == theirs["search_loss"]
    assert mine["done"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "lacks problem_factory and budget: use ray_trainable"),
        (AT, "lacks problem_factory and budget: use ray_trainable"),
        ({"budget": BUDGET}, "IFTTrainable lacks problem_factory: use"),
        ({"problem_factory": make_tiny}, "IFTTrainable lacks budget: use"),
        ({"seed": 1}, "IFTTrainable lacks problem_factory and budget: use"),
        (COMMON | {"meta_lrr": 0.1}, "meta_lrr is not a meta-hyperparameter; did you mean"),
        (COMMON | {"meta_lr": -1.0}, "meta_lr"),
        (COMMON | {"rank": 3}, "rank belongs to the inverse"),
        (COMMON | {"problem_factory": "tiny"}, "problem_factory must be a function"),
    ],
)
def test_what_is_missing_or_wrong_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        IFTTrainable(config=config)


@pytest.mark.parametrize("make_one", [ray_trainable, ray_function])
def test_a_space_with_a_wrong_corner_is_refused_at_once(make_one: Any) -> None:
    with pytest.raises(UsageError, match="alpha"):
        make_one(make_tiny, MetaSpace({"alpha": Float(0.0, 1.0)}), BUDGET)


def test_keys_of_another_inverse_that_ray_drew_too_are_left_out() -> None:
    space = MetaSpace({"inverse": Choice(("identity", "neumann")), "terms": Choice((3, 4))})
    kind = ray_trainable(make_tiny, space, BUDGET, config=CONFIG, device="cpu")
    assert results_of(kind(config={"inverse": "identity", "terms": 4}))[-1]["hvps"] == 0.0
    assert results_of(kind(config={"inverse": "neumann", "terms": 4}))[-1]["hvps"] == 16.0


CASES: dict[str, tuple[ProblemFactory, dict[str, Any], int]] = {
    "done": (make_tiny, {}, 7),
    "diverged": (make_tiny, {"alpha": 1e6}, 5),
    "nonfinite": (functools.partial(make_faulty, fault="nan", after=6), {}, 2),
    "nonfinite, at once": (functools.partial(make_faulty, fault="nan", after=0), {}, 0),
    "oom": (functools.partial(make_faulty, fault="oom", after=6), {}, 2),
    "oom, at once": (functools.partial(make_faulty, fault="oom", after=0), {}, 0),
    "oom, before": (
        functools.partial(make_eventful_at, events={0.05: run_out_of_memory}, after=0),
        {},
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_results_are_flat_and_finite_and_the_last_one_says_why(case: str, tmp_path: Path) -> None:
    factory, changes, steps = CASES[case]
    space = MetaSpace({"alpha": Float(1e-3, 1e7), "meta_lr": Float(1e-3, 1.0)})
    kind = ray_trainable(factory, space, Budget(outer_steps=7), config=CONFIG, device="cpu")
    trainable: Any = kind(config=AT | {"alpha": 0.1} | changes)
    results = results_of(trainable)
    for result in results:
        values = {k: v for k, v in result.items() if k not in ADDED_BY_RAY}
        assert all(isinstance(v, str | bool | int | float) for v in values.values())
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        assert all(math.isfinite(v) for v in numbers.values())
        assert isinstance(result["objective"], float)
    assert [r["done"] for r in results] == [False] * (len(results) - 1) + [True]
    assert [r["stop_reason"] for r in results[:-1]] == [""] * (len(results) - 1)
    assert results[-1]["stop_reason"] == case.partition(",")[0]
    assert results[-1]["outer_step"] == steps
    if case == "done":
        assert results[-1]["objective"] == results[-1]["search_error"]
        assert "retrained_test_error" in results[-1]
    else:
        assert results[-1]["objective"] == results[-1]["search_error"] == 1e9
    trainable.save(str(tmp_path))  # as Ray does at the end
    trainable.stop()


def test_a_result_follows_every_evaluation() -> None:
    trainable = make(make_tiny, Budget(outer_steps=5, eval_every=2))(config=AT)
    results = results_of(trainable)
    assert [r["outer_step"] for r in results] == [2, 4, 5]
    assert [r["training_iteration"] for r in results] == [1, 2, 3]


@pytest.mark.parametrize(
    ("factory", "metric", "named"),
    [
        (make_tiny, None, "search_error"),
        (make_tiny, "search_loss", "search_loss"),
        (make_quadratic, None, "search_loss"),
    ],
)
def test_the_objective_is_the_metric(
    factory: ProblemFactory, metric: str | None, named: str
) -> None:
    result = results_of(make(factory, Budget(outer_steps=1), metric=metric)(config=AT))[-1]
    assert result["metric"] == named
    assert result["objective"] == result[named]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_objective_is_the_best_so_far_and_the_latest_beside_it(mode: str) -> None:
    budget = Budget(outer_steps=10, retrain=False)
    results = results_of(
        make(make_quadratic, budget, metric="search_loss", mode=mode)(config={"meta_lr": 0.1})
    )
    values = [result["latest_objective"] for result in results]
    assert values[:-1] == [result["search_loss"] for result in results[:-1]]
    better = min if mode == "min" else max
    best = [better(values[: n + 1]) for n in range(10)]
    assert [result["objective"] for result in results] == best
    assert best != values


def test_a_member_is_not_judged_by_what_it_has_taken_over(tmp_path: Path) -> None:
    kind = make(make_quadratic, Budget(outer_steps=8, retrain=False))
    donor, heir = (kind(config={"meta_lr": rate}) for rate in (0.1, 0.3))
    donor._session.trial_id, heir._session.trial_id = "donor", "heir"
    good = [donor.train() for _ in range(3)]  # type: ignore[no-untyped-call]
    donor.save_checkpoint(str(tmp_path))
    heir.load_checkpoint(str(tmp_path))
    assert heir._session.conclude(3, tmp_path / "found") == ({}, None)  # nothing of its own yet
    assert not (tmp_path / "found").exists()
    heir.load_checkpoint(str(tmp_path))
    results = results_of(heir)
    values = [result["latest_objective"] for result in results]
    assert [result["outer_step"] for result in results] == [4, 5, 6, 7, 8]
    assert min(values) > good[-1]["objective"]
    assert [r["objective"] for r in results] == [min(values[: n + 1]) for n in range(5)]


def test_a_metric_that_is_not_measured_is_refused() -> None:
    trainable: Any = make(make_tiny, metric="search_accuracy", mode="max")(config=AT)
    with pytest.raises(UsageError, match="choose a metric from search_error, search_loss"):
        trainable.train()


def test_a_mistake_in_the_problem_is_raised() -> None:
    trainable: Any = make(functools.partial(make_faulty, fault="bug", after=3))(config=AT)
    trainable.train()
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        trainable.train()


@pytest.mark.nightly
def test_trials_in_one_process_and_in_ones_own_have_the_same_rows(tmp_path: Path) -> None:
    trainable = tune.with_parameters(IFTTrainable, **COMMON)
    results = fit(
        alone(trainable), tmp_path, {"meta_lr": tune.grid_search([0.05, 0.06])}, reuse_actors=True
    )
    assert not results.errors
    assert len({metrics["pid"] for metrics in metrics_of(results)}) == 1
    assert_same_rows(tmp_path / "ray", without_ray(tmp_path / "alone", [0.05, 0.06]), 0.05, 0.06)


def test_a_trainable_that_became_another_trial_forgets_the_first() -> None:
    used = make(make_tiny)(config=AT)
    results_of(used)
    assert used.reset_config({"meta_lr": 0.06})
    fresh = make(make_tiny)(config={"meta_lr": 0.06})
    mine, theirs = (results_of(t)[-1] for t in (used, fresh))
    assert mine["search_loss"] == theirs["search_loss"]
    assert mine["gradient_equivalents"] == theirs["gradient_equivalents"]


def test_a_key_of_what_is_common_can_vary_beside_a_plan() -> None:
    """A sweep over seeds, say."""
    results = [results_of(make(make_tiny)(config=AT | {"seed": seed}))[-1] for seed in (0, 1)]
    assert results[0]["search_loss"] != results[1]["search_loss"]


def test_the_faulty_problem_is_as_the_other_tests_believe(tmp_path: Path) -> None:
    ends = [results_of(make(faulty)(config={"meta_lr": r}))[-1] for r in (0.05, 0.06, 0.07)]
    assert [end["stop_reason"] for end in ends] == ["done", "nonfinite", "oom"]


def test_the_space_that_ray_draws_from_is_the_space() -> None:
    drawn = {key: domain.sample() for key, domain in SPACE.to_ray().items()}
    assert set(drawn) == set(SPACE.distributions)
    trainable = ray_trainable(make_tiny, SPACE, BUDGET, config=CONFIG, device="cpu")
    assert results_of(trainable(config=drawn))[-1]["stop_reason"] == "done"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_diverged_trial_reports_the_worst_value_of_its_direction(mode: str) -> None:
    space = MetaSpace({"alpha": Float(1e6, 1e7)})
    kind = ray_trainable(
        make_tiny,
        space,
        Budget(outer_steps=9),
        config=CONFIG,
        device="cpu",
        metric="search_loss",
        mode=mode,
    )
    results = results_of(kind(config={"alpha": 1e6}))
    last, before = results[-1], results[:-1]
    assert (last["stop_reason"], last["metric"], last["mode"]) == ("diverged", "search_loss", mode)
    worse = max if mode == "min" else min
    for key in ("objective", "latest_objective", "search_loss"):
        assert math.isfinite(last[key])
        assert worse(result[key] for result in results) == last[key]
    # Of another metric that somebody may search by, the worst in its own direction.
    assert last["search_error"] == max(result["search_error"] for result in results)
    assert before
    stop = DivergenceStopper(patience=1, statuses=())
    assert [stop("a trial", result) for result in results] == [False] * len(before) + [True]


def test_a_member_of_a_population_reports_to_the_last_though_it_has_diverged() -> None:
    space = MetaSpace({"alpha": Float(1e6, 1e7)})
    budget = Budget(outer_steps=9, retrain=False)
    kind = ray_trainable(make_tiny, space, budget, config=CONFIG, device="cpu", iterations=7)
    trial = kind(config={"alpha": 1e6})
    results = [trial.train() for _ in range(7)]  # type: ignore[no-untyped-call]
    assert [result["done"] for result in results] == [False] * 6 + [True]
    worst = Direction.MIN.penalty
    assert [result["objective"] == worst for result in results] == [False] * 4 + [True] * 3
    assert [result["stop_reason"] for result in results] == [""] * 6 + ["diverged"]
