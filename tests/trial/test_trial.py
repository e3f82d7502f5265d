"""One trial: how long it runs, how it ends, and that it goes on as if it had never stopped."""

from __future__ import annotations

import functools
import gc
import itertools
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import (
    BUDGET,
    CONFIG,
    assert_same_tensors,
    make_faulty,
    make_quadratic,
    make_tiny,
)

from ift_tune import BilevelProblem, Budget, Identity, MetaConfig, Neumann, UsageError
from ift_tune.base.checkpoints import load_checkpoint, save_checkpoint
from ift_tune.base.errors import CheckpointError
from ift_tune.base.status import HEALTH_COLUMNS, StopReason
from ift_tune.joint.cost import HVP
from ift_tune.joint.joint import SPLITS
from ift_tune.trial.trial import ProblemFactory, Trial

DIVERGING = MetaConfig(inverse=Neumann(terms=5, alpha=1e6), inner_steps=2, inner_lr=0.02)


def started(
    factory: ProblemFactory = make_tiny,
    config: MetaConfig = CONFIG,
    budget: Budget = BUDGET,
    **others: Any,
) -> Trial:
    trial = Trial(factory, config, budget, device="cpu", **others)
    trial.setup()
    return trial


def rows_of(trial: Trial) -> list[dict[str, Any]]:
    """Step to the end."""
    rows = []
    while trial.stop_reason is None:
        row = trial.step()
        if row is not None:
            rows.append(row)
    return rows


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def state_of(trial: Trial) -> list[torch.Tensor]:
    problem = trial.joint.problem
    return [p.detach().clone() for p in (*problem.weights(), *problem.hypers())]


@pytest.mark.parametrize("steps", [1, 3])
def test_outer_steps_are_counted(steps: int) -> None:
    trial = started(budget=Budget(outer_steps=steps))
    rows = rows_of(trial)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert trial.stop_reason is StopReason.DONE
    assert trial.joint.inner_steps == steps * CONFIG.inner_steps


def test_a_row_has_metrics_costs_and_every_health_column() -> None:
    (row,) = rows_of(started(budget=Budget(outer_steps=1)))
    metrics = {f"{s}_{k}" for s in ("train", "val", "search", "test") for k in ("loss", "error")}
    costs = {"wall_seconds", "gradient_equivalents", "hvps", "peak_memory_bytes"}
    assert metrics | costs | set(HEALTH_COLUMNS) <= set(row)
    assert row["hvps"] == CONFIG.inverse.terms  # type: ignore[attr-defined]
    # By the last bits of PyTorch's random numbers, which are others in each version.
    assert row["solve_status"] in ("truncated", "negative_curvature")


@pytest.mark.parametrize("limit", [1.0, 15.0, 22.5, 30.0, 35.0, 40.0, 60.0])
@pytest.mark.parametrize("eval_every", [1, 3])
def test_the_counted_budget_is_never_exceeded_after_the_first_step(
    limit: float, eval_every: int
) -> None:
    trial = started(budget=Budget(gradient_equivalents=limit, eval_every=eval_every))
    rows = rows_of(trial)
    assert trial.stop_reason is StopReason.DONE
    assert trial.joint.cost.gradient_equivalents == rows[-1]["gradient_equivalents"]
    assert len(rows) == 1 or rows[-1]["gradient_equivalents"] <= limit


@pytest.mark.parametrize("limit", [15.0, 30.0, 60.0, 100.0])
def test_the_counted_budget_is_used_up(limit: float) -> None:
    one = rows_of(started(budget=Budget(outer_steps=1)))[0]["gradient_equivalents"]
    rows = rows_of(started(budget=Budget(gradient_equivalents=limit)))
    # The dearest step measures a residual, too.
    assert rows[-1]["gradient_equivalents"] + one + HVP > limit


def test_seconds_end_a_trial_after_the_step_that_spent_them() -> None:
    trial = started(budget=Budget(seconds=1e-9))
    assert len(rows_of(trial)) == 1
    assert trial.stop_reason is StopReason.DONE


def test_the_first_limit_reached_ends_the_trial() -> None:
    assert len(rows_of(started(budget=Budget(outer_steps=2, seconds=1e6)))) == 2
    assert len(rows_of(started(budget=Budget(outer_steps=2, gradient_equivalents=1.0)))) == 1


@pytest.mark.parametrize(
    ("steps", "every", "evaluated"), [(5, 1, [1, 2, 3, 4, 5]), (5, 2, [2, 4, 5]), (2, 9, [2])]
)
def test_search_and_test_are_evaluated_now_and_then_and_at_the_end(
    steps: int, every: int, evaluated: list[int]
) -> None:
    rows = rows_of(started(budget=Budget(outer_steps=steps, eval_every=every)))
    assert [row["step"] for row in rows if "search_error" in row] == evaluated
    assert [row["step"] for row in rows if "test_loss" in row] == evaluated


@pytest.mark.parametrize("every", [1, 2])
def test_the_gap_is_between_test_and_validation_of_the_same_row(every: int) -> None:
    rows = rows_of(started(budget=Budget(outer_steps=4, eval_every=every)))
    evaluated = [row for row in rows if "test_error" in row]
    assert [row["val_test_gap"] for row in evaluated] == pytest.approx(
        [row["test_error"] - row["val_error"] for row in evaluated], abs=1e-12
    )


def test_a_series_that_diverges_ends_the_trial_and_leaves_lambda_alone() -> None:
    trial = started(config=DIVERGING, budget=Budget(outer_steps=50))
    before = [h.detach().clone() for h in trial.joint.problem.hypers()]
    rows = rows_of(trial)
    assert trial.stop_reason is StopReason.DIVERGED
    assert [row["skipped"] for row in rows] == [1.0] * 5
    assert_same_tensors(list(trial.joint.problem.hypers()), before)
    assert trial.value is not None


@pytest.mark.parametrize(
    ("fault", "reason"), [("nan", StopReason.NONFINITE), ("oom", StopReason.OOM)]
)
def test_a_step_that_goes_wrong_gives_no_row_but_a_reason(fault: str, reason: StopReason) -> None:
    trial = started(functools.partial(make_faulty, fault=fault, after=6))
    rows = rows_of(trial)
    assert trial.stop_reason is reason
    assert [row["step"] for row in rows] == [1, 2]
    assert trial.value == rows[-1]["search_error"]


def test_without_an_evaluation_there_is_no_value() -> None:
    trial = started(functools.partial(make_faulty, fault="nan", after=0))
    assert rows_of(trial) == []
    assert trial.stop_reason is StopReason.NONFINITE
    assert trial.value is None


def test_another_exception_is_not_swallowed() -> None:
    trial = started(functools.partial(make_faulty, fault="bug", after=0))
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        trial.step()


def test_the_metric_is_the_error_where_there_is_one() -> None:
    classifier, quadratic = started(), started(make_quadratic)
    rows_of(classifier)
    rows_of(quadratic)
    assert (classifier.metric, quadratic.metric) == ("search_error", "search_loss")
    assert quadratic.value == quadratic.metrics["search_loss"]


@pytest.mark.parametrize("every", [1, 2])
def test_the_metric_can_be_chosen(every: int) -> None:
    trial = started(budget=Budget(outer_steps=2, eval_every=every), metric="search_loss")
    trial.step()
    assert trial.metric == "search_loss"
    trial.step()
    assert trial.value == trial.metrics["search_loss"]


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are() -> None:
    trial = started(metric="search_accuracy", mode="max")
    with pytest.raises(UsageError, match=r"choose a metric from search_error, search_loss"):
        trial.step()


def test_retraining_is_plain_training_at_the_best_lambda() -> None:
    config = MetaConfig(
        inverse=Identity(), meta_lr=0.1, inner_steps=3, inner_lr=0.5, inner_optimizer="sgd"
    )
    trial = started(make_quadratic, config, Budget(outer_steps=4))
    rows_of(trial)
    found = trial.finish()
    hyper = trial.found()["value"]
    weights = torch.zeros(6, dtype=torch.float64)
    fixed = make_quadratic(config, torch.device("cpu"), 0)
    losses = []
    for _ in range(12):
        weights = weights - 0.5 * (fixed.matrix @ weights - fixed.coupling @ hyper)
        losses.append(0.5 * (weights - fixed.goal).square().sum() + 0.5 * hyper.square().sum())
    # All splits of this problem measure the same, so the best for search is the best for test.
    assert found["retrained_test_loss"] == pytest.approx(float(min(losses)), rel=1e-12)
    assert found["retrained_test_loss"] != pytest.approx(trial.metrics["test_loss"], rel=1e-6)


def test_retraining_starts_from_the_same_weights_and_leaves_lambda_frozen() -> None:
    problems: list[BilevelProblem] = []
    starts: list[list[torch.Tensor]] = []

    def factory(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        problem = make_tiny(config, device, seed)
        problems.append(problem)
        starts.append([w.detach().clone() for w in problem.weights()])
        return problem

    trial = started(factory)
    rows_of(trial)
    before = state_of(trial)
    trial.retrain()
    assert_same_tensors(starts[1], starts[0])
    assert_same_tensors(problems[1].hypers(), problems[0].hypers())
    assert_same_tensors(state_of(trial), before)
    moved = [not torch.equal(w, s) for w, s in zip(problems[1].weights(), starts[1], strict=True)]
    assert all(moved)


def test_finish_tells_what_was_learned_and_retrains_only_if_asked() -> None:
    trial = started(budget=Budget(outer_steps=1, retrain=False))
    rows_of(trial)
    found = trial.finish()
    measured = {f"{split}_{k}" for split in SPLITS for k in ("loss", "error")} | {"val_test_gap"}
    learned = {f"learned_{q}" for q in ("min", "median", "mean", "max", "words")}
    assert set(found) == measured | learned
    assert found["learned_words"] == trial.joint.problem.words()
    decays = torch.nn.functional.softplus(
        torch.cat([h.detach().flatten() for h in trial.joint.problem.hypers()])
    )
    assert found["learned_max"] == pytest.approx(float(decays.max()), rel=1e-5)
    assert set(started_and_finished(retrain=True)) - set(found) == {
        *("retrained_test_loss", "retrained_test_error"),
        *("retrained_search_loss", "retrained_search_error"),
    }


def started_and_finished(*, retrain: bool) -> dict[str, float]:
    trial = started(budget=Budget(outer_steps=1, retrain=retrain))
    rows_of(trial)
    return trial.finish()


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_a_loaded_trial_goes_on_to_the_bit(stopped_after: int, warm: bool, tmp_path: Path) -> None:
    config = CONFIG.updated({"alpha_scale": 1.0, "warm_start": warm})
    budget = Budget(outer_steps=6, eval_every=2)
    whole = started(config=config, budget=budget, seed=3)
    expected = rows_of(whole)

    first = started(config=config, budget=budget, seed=3)
    rows = [row for _ in range(stopped_after) if (row := first.step()) is not None]
    first.save(tmp_path / "checkpoint.pt")
    rows_of(first)  # what happens to the first after saving must not matter
    second = started(config=config, budget=budget, seed=3)
    second.load(tmp_path / "checkpoint.pt")
    rows += rows_of(second)

    assert without_times(rows) == without_times(expected)
    assert_same_tensors(state_of(second), state_of(whole))
    assert second.finish() == whole.finish()
    assert second.stop_reason is StopReason.DONE


def test_times_and_the_stop_reason_survive(tmp_path: Path) -> None:
    trial = started()
    rows = rows_of(trial)
    trial.save(tmp_path / "checkpoint.pt")
    again = started()
    again.load(tmp_path / "checkpoint.pt")
    assert again.stop_reason is StopReason.DONE
    assert again.metrics == trial.metrics
    assert again.metrics["wall_seconds"] == rows[-1]["wall_seconds"]
    assert all(a["wall_seconds"] < b["wall_seconds"] for a, b in itertools.pairwise(rows))


def test_a_trial_with_other_settings_takes_over_only_when_it_may(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    donor = started(budget=Budget(outer_steps=6))
    for _ in range(2):
        donor.step()
    donor.save(path)
    heir = started(config=CONFIG.updated({"meta_lr": 0.2, "inner_steps": 3}))
    before = heir.fingerprint()
    with pytest.raises(CheckpointError, match="of a trial with other meta-hyperparameters"):
        heir.load(path)
    assert heir.fingerprint() == before
    heir.load(path, inherit=True)
    assert heir.fingerprint() == donor.fingerprint() != before
    assert heir.config.meta_lr == 0.2
    kept = {k: v for k, v in donor.metrics.items() if k not in ("best_value", "best_step")}
    assert heir.metrics == kept
    assert heir.value is None  # before it has been evaluated itself
    rows = rows_of(heir)
    assert [row["step"] for row in rows] == [3, 4]
    assert rows[0]["gradient_equivalents"] > donor.metrics["gradient_equivalents"]
    assert rows[0]["wall_seconds"] > donor.metrics["wall_seconds"]
    assert heir.joint.inner_steps == 2 * CONFIG.inner_steps + 2 * 3


def test_an_heir_with_the_same_settings_is_no_twin(tmp_path: Path) -> None:
    donor = started()
    donor.step()
    donor.save(tmp_path / "checkpoint.pt")
    heir = started()
    heir.load(tmp_path / "checkpoint.pt", inherit=True)
    assert heir.fingerprint() == donor.fingerprint()
    assert heir.joint.outer_steps == donor.joint.outer_steps
    kept, fresh = donor.joint.state_dict(), heir.joint.state_dict()
    assert kept["outer_optimizer"]["state"]
    assert not fresh["outer_optimizer"]["state"]
    assert fresh["inner_optimizer"]["state"].keys() == kept["inner_optimizer"]["state"].keys()


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_an_heir_keeps_is_of_its_own_settings(
    mode: str, steps_before: int, tmp_path: Path
) -> None:
    budget = Budget(outer_steps=7, retrain=False)
    aim: dict[str, Any] = {"metric": "search_loss", "mode": mode, "budget": budget}
    donor = started(make_quadratic, **aim)
    for _ in range(3):
        donor.step()
    donor.save(tmp_path / "checkpoint.pt")
    # Of the heir's evaluations none is as good as the donor's: it is ruined, or learns nothing.
    worse = MetaConfig(inner_optimizer="sgd", inner_lr=1e-6, meta_lr=50.0 if mode == "min" else 1.0)
    heir = started(make_quadratic, config=worse, **aim)
    for _ in range(steps_before):
        heir.step()
    heir.load(tmp_path / "checkpoint.pt", inherit=True)
    rows = rows_of(heir)
    values = [row["search_loss"] for row in rows]
    assert [row["step"] for row in rows] == [4, 5, 6, 7]
    best = min(values) if mode == "min" else max(values)
    assert heir.value == best
    assert heir.totals()["best_step"] == 4 + values.index(best)
    kept = heir.kept()
    assert kept is not None
    assert kept["config"] == worse.to_flat()
    assert kept["best_value"] == best
    with heir.as_found() as problem:
        assert problem.evaluate(problem.splits.search)["loss"] == pytest.approx(best)


def test_an_heir_of_what_is_over_waits_for_values_of_its_own(tmp_path: Path) -> None:
    """Its donor came to no better one; under other settings that says nothing."""
    budget = Budget(outer_steps=20, patience=1)
    donor = started(make_quadratic, budget=budget)
    rows_of(donor)
    donor.metrics |= donor.finish()
    assert donor.stop_reason is StopReason.DONE
    assert donor.joint.outer_steps < 20
    donor.save(tmp_path / "checkpoint.pt")
    heir = started(make_quadratic, config=CONFIG.updated({"meta_lr": 0.01}), budget=budget)
    heir.load(tmp_path / "checkpoint.pt", inherit=True)
    assert heir.stop_reason is None
    assert not [name for name in heir.metrics if name.startswith(("learned_", "retrained_"))]
    first = rows_of(heir)[0]
    assert first["best_step"] == first["step"] == donor.joint.outer_steps + 1


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("part", ["model", "hyper"])
def test_a_checkpoint_that_does_not_hold_what_was_saved_is_refused(
    part: str, inherit: bool, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    trial = started()
    trial.step()
    trial.save(path)
    state = load_checkpoint(path)
    next(iter(state["joint"][part].values())).view(-1)[0] += 1e-3
    save_checkpoint(path, state)
    changes = {"meta_lr": 0.2} if inherit else {}
    with pytest.raises(CheckpointError, match="does not hold the weights that were saved"):
        started(config=CONFIG.updated(changes)).load(path, inherit=inherit)


def test_a_checkpoint_of_another_problem_is_refused(tmp_path: Path) -> None:
    trial = started()
    trial.save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        started(make_quadratic).load(tmp_path / "checkpoint.pt")


def test_the_same_seed_gives_the_same_rows_and_another_does_not() -> None:
    one, same, other = (without_times(rows_of(started(seed=s))) for s in (1, 1, 2))
    assert one == same
    assert [r["train_loss"] for r in one] != [r["train_loss"] for r in other]


def test_a_trial_leaves_everybody_elses_random_numbers_alone() -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    rows_of(started())
    assert torch.equal(torch.rand(3), undisturbed)


def test_cleanup_lets_go_of_the_problem() -> None:
    trial = started()
    trial.step()
    model = weakref.ref(trial.joint.problem.model)
    trial.cleanup()
    gc.collect()
    assert model() is None
    assert trial.metrics["step"] == 1


def test_a_trial_that_is_not_set_up_travels() -> None:
    factory = functools.partial(make_faulty, fault="nan", after=6)
    trial = pickle.loads(pickle.dumps(Trial(factory, CONFIG, BUDGET, device="cpu", seed=4)))
    trial.setup()
    assert without_times(rows_of(trial)) == without_times(rows_of(started(factory, seed=4)))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        Trial(make_tiny, CONFIG, BUDGET, device="gpu0")
