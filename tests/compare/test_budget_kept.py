"""No search costs more than its budget, and one without an end uses it up."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_comparisons import (
    APPLICABLE_ARMS,
    BATCH,
    ENDLESS_ARMS,
    SIZES,
    comparison,
    make_erring,
    of_cell,
    run,
)

from ift_tune import Budget, ConjugateGradient, Identity, MetaConfig, Neumann, Nystrom
from ift_tune.compare.arms import ARMS
from ift_tune.compare.comparison import Comparison
from ift_tune.hyper import ExampleWeights
from ift_tune.implicit.inverse import Inverse
from ift_tune.trial.tables import Results

ROUNDING = 1.0 + 1e-12
ONE_STAGE = [name for name in APPLICABLE_ARMS if not ARMS[name].trials.groundwork]
PLAIN_COST = 6 * (1.0 + SIZES["search"] / 3.0 / BATCH)  # of a whole training that does not stop


def spent(results: Results, arm: str) -> float:
    return float(of_cell(results.trials, arm)["gradient_equivalents"].sum())


def config(inverse: Inverse, **changes: Any) -> MetaConfig:
    return MetaConfig(inverse=inverse, meta_lr=0.1, inner_steps=2, inner_lr=0.1, **changes)


def next_step(trial: pd.Series[Any], batches: str) -> float:
    """Return the cost of the first step of a trial that was not begun, by hand."""
    unit = SIZES["train"] if batches == "full" else BATCH
    evaluation = SIZES["search"] / 3.0 / unit
    if trial["arm"] != "ift+tpe":
        on_val = 3 / unit if ARMS[trial["arm"]].train_on_val else 0.0
        on_train = 0.0 if trial["arm"] == "val" else 1.0
        ranking = SIZES["train"] / 3.0 / unit if trial["arm"] == "loss-ranking" else 0.0
        return float(trial["inner_steps"]) * (on_train + on_val) + evaluation + ranking
    products = 1.0 + (0.0 if pd.isna(trial["terms"]) else 12.0 + trial["terms"])
    curvature = 9 if batches == "curvature" else unit
    return float(
        trial["inner_steps"] + (1.0 + 2.0 * products) * curvature / unit + 3 / unit + evaluation
    )


@pytest.mark.parametrize(
    ("whole", "batches"),
    [
        pytest.param(
            comparison(36.0, batches="full"), "full", id="full-batch", marks=pytest.mark.nightly
        ),
        pytest.param(
            comparison(31.7, config=config(Identity()), training_steps=50), "mini", id="identity"
        ),
        pytest.param(
            comparison(
                75.0,
                batches="curvature",
                config=config(Neumann(terms=2)),
                trial_budget=Budget(outer_steps=4, eval_every=3),
            ),
            "curvature",
            marks=pytest.mark.nightly,
            id="larger-curvature-batches-and-rare-evaluations",
        ),
    ],
)
def test_every_arm_keeps_to_the_budget_and_endless_ones_use_it_up(
    whole: Comparison, batches: str, tmp_path: Path
) -> None:
    results = run(whole, tmp_path / "run", *ONE_STAGE)
    assert set(results.trials["arm"]) == set(ONE_STAGE)
    for arm in ONE_STAGE:
        assert_within_budget(whole, results, arm, batches)


@pytest.mark.parametrize("batches", ["mini", "full", "curvature"])
def test_so_does_each_arm_whose_first_trial_lays_the_ground(batches: str, tmp_path: Path) -> None:
    whole = comparison(128.3, batches=batches, weighted=True)  # a half of it pays for a step
    arms = [name for name, arm in ARMS.items() if arm.trials.groundwork]
    results = run(whole, tmp_path / "run", *arms)
    for arm in arms:
        assert_within_budget(whole, results, arm, batches)
        assert of_cell(results.trials, arm)["best_value"].notna().sum() >= 2


def assert_within_budget(whole: Comparison, results: Results, arm: str, batches: str) -> None:
    """Look at what a search has spent, and at what it has left."""
    trials = of_cell(results.trials, arm)
    assert 0.0 < spent(results, arm) <= whole.limit * ROUNDING
    for number, rows in of_cell(results.steps, arm).groupby("trial"):
        own = float(trials.set_index("trial")["gradient_equivalents"][number])
        assert rows["gradient_equivalents"].max() <= own  # nothing after the last row is free
        assert rows["gradient_equivalents"].is_monotonic_increasing
    # Only the last may have done nothing, for want of budget.
    assert (trials["gradient_equivalents"].iloc[:-1] > 0.0).all()
    if arm not in ENDLESS_ARMS:
        return
    last = trials.iloc[-1]
    left = whole.limit - spent(results, arm)
    if last["gradient_equivalents"] == 0.0:
        assert last["status"] == "pruned"
        assert pd.isna(last["best_value"])
        assert left < next_step(last, batches) * ROUNDING
    else:
        assert left <= whole.limit * (ROUNDING - 1.0)


def test_ift_uses_its_budget_up_to_one_step(tmp_path: Path) -> None:
    whole = comparison(80.0, batches="drop", config=config(Neumann(terms=1)))
    results = run(whole, tmp_path / "run", "ift")
    warm = 2.0 + (1.0 + 2.0 * (1.0 + 2.0 + 1.0)) + 3.0 / BATCH + SIZES["search"] / 3.0 / BATCH
    assert 80.0 - warm - 10.0 * 2.0 < spent(results, "ift") <= 80.0  # a cold estimate takes 10 more


@pytest.mark.parametrize(
    "inverse",
    [
        Neumann(terms=3),
        Neumann(terms=2, alpha=0.1),
        ConjugateGradient(max_steps=4, tolerance=1e-8),
        Nystrom(rank=3, damping=0.1),
    ],
    ids=lambda inverse: str(inverse.name),
)
@pytest.mark.parametrize("limit", [23.0, 55.5])
def test_ift_keeps_to_the_budget_with_every_inverse(
    inverse: Inverse, limit: float, tmp_path: Path
) -> None:
    warm_start = inverse.refines
    eager = Budget(outer_steps=3, eval_every=2)
    whole = comparison(limit, config=config(inverse, warm_start=warm_start), trial_budget=eager)
    results = run(whole, tmp_path / "run", "ift", "ift+tpe")
    for arm in ("ift", "ift+tpe"):
        assert spent(results, arm) <= limit * ROUNDING


def test_a_budget_a_little_too_small_for_one_step_buys_nothing(tmp_path: Path) -> None:
    arms = [n for n, arm in ARMS.items() if arm.trials.refusal(ExampleWeights(1)) is None]
    results = run(comparison(1.2, weighted=True), tmp_path / "run", *arms)
    assert sorted(results.trials["arm"]) == sorted(arms)  # one trial each, none of them begun
    assert (results.trials["gradient_equivalents"] == 0.0).all()
    assert set(results.trials["stop_reason"]) == {"pruned"}
    assert results.steps.empty


def test_one_step_that_fits_exactly_is_taken(tmp_path: Path) -> None:
    step = 1.0 + SIZES["search"] / 3.0 / BATCH
    exact = run(comparison(step * 3, batches="drop"), tmp_path / "exact", "none")
    assert spent(exact, "none") == pytest.approx(step * 3)
    short = run(comparison(step * 3 - 1e-6, batches="drop"), tmp_path / "short", "none")
    assert len(short.steps) == 2


def test_retraining_and_the_test_split_are_free(tmp_path: Path) -> None:
    results = run(comparison(70.0, batches="drop"), tmp_path / "run", "ift")
    rows = results.steps
    assert rows["retrained_test_loss"].notna().sum() >= 1
    # 2 inner steps, the gradients by w and λ, and 2 for each product with the mixed one among them.
    hvps = rows["hvps"].astype(float).diff().fillna(rows["hvps"].iloc[0])
    step = 2.0 + 1.0 + 3.0 / BATCH + 2.0 * (hvps + 1.0) + SIZES["search"] / 3.0 / BATCH
    paid = rows["gradient_equivalents"].diff().fillna(rows["gradient_equivalents"].iloc[0])
    assert paid.tolist() == pytest.approx(step.tolist())
    assert spent(results, "ift") == rows["gradient_equivalents"].iloc[-1]


def test_a_plain_training_costs_its_steps_and_evaluations(tmp_path: Path) -> None:
    results = run(comparison(1000.0, batches="drop"), tmp_path / "run", "none")
    (trial,) = results.trials.to_dict("records")
    steps = len(results.steps)
    assert trial["gradient_equivalents"] == pytest.approx(PLAIN_COST * steps / 6)
    assert trial["hvps"] == 0


@pytest.mark.parametrize("arm", ["random", "ift", "ift+tpe"])
def test_seconds_are_kept_up_to_one_step(arm: str, tmp_path: Path) -> None:
    whole = comparison(budget=Budget(seconds=0.15))
    results = run(whole, tmp_path / "run", arm)
    total = float(results.trials["wall_seconds"].sum())
    assert total >= 0.15
    before = results.steps["wall_seconds"].iloc[-2] if len(results.steps) > 1 else 0.0
    assert before <= 0.2  # the evaluation that came after the clock was looked at
    assert total - 0.15 < 0.5  # one step, on a machine that may be busy


def test_what_a_training_that_broke_has_cost_counts(tmp_path: Path) -> None:
    whole = comparison(20.0, problem_factory=functools.partial(make_erring, after=2))
    results = run(whole, tmp_path / "run", "random")
    trials = results.trials
    broken = trials[trials["stop_reason"] == "nonfinite"]
    assert len(broken) >= 2
    assert (broken["gradient_equivalents"] > 0.0).all()
    assert trials["gradient_equivalents"].sum() <= 20.0 * ROUNDING
