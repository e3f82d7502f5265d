"""Which evaluation is a trial's result: best-checkpoint selection, early stopping, the score."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparisons import make_clouds, make_erring

from ift_tune import Budget, MetaConfig, Neumann, UsageError
from ift_tune.base.checkpoints import fingerprint
from ift_tune.base.status import StopReason
from ift_tune.compare.arms.standard import CoarselySet
from ift_tune.compare.comparison import EARLY_STOPPING_PATIENCE, BaselineRetraining, baseline_trial
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.scored import RETRAINING_RATIO, BestEvaluation
from ift_tune.trial.selection import RETRAINED, BestModel
from ift_tune.trial.tables import MEASURED_COLUMNS
from ift_tune.trial.training import EVALUATIONS, BaselineTraining, JointTraining
from ift_tune.trial.trial import Trial

# λ moves fast and the weights are trained hard, so that the best moment is not the last.
WILD = MetaConfig(inverse=Neumann(terms=1), meta_lr=1.0, inner_steps=2, inner_lr=0.3)
STEPS = 9
Rows = list[dict[str, Any]]


def selected(
    batches: str = "mini",
    *,
    budget: Budget | None = None,
    config: MetaConfig = WILD,
    factory: Any = None,
    training_steps: int = 8,
    incumbent: float = math.inf,
    seed: int = 0,
) -> Trial:
    """Return an IFT trial of which the best evaluation counts."""
    return Trial(
        factory or functools.partial(make_clouds, batches=batches),
        config,
        budget or Budget(outer_steps=STEPS),
        seed=seed,
        device="cpu",
        metric="search_loss",
        selection=BestEvaluation(
            retraining=BaselineRetraining(training_steps), incumbent=incumbent
        ),
    )


def plain(
    batches: str = "mini",
    *,
    budget: Budget | None = None,
    config: MetaConfig = WILD,
    factory: Any = None,
    training_steps: int = 8,
    given: dict[str, float] | None = None,
) -> Trial:
    """Return a baseline training that is evaluated after every inner step, if it is short."""
    return baseline_trial(
        factory or functools.partial(make_clouds, batches=batches),
        config,
        BaselineTraining(training_steps, given=given or {}),
        budget=budget,
        device="cpu",
        metric="search_loss",
    )


def score(trial: Trial) -> dict[str, float]:
    """Return the score of the best evaluation so far."""
    return {k: v for k, v in trial.metrics.items() if k.startswith(RETRAINED)}


def to_the_end(trial: Trial) -> Rows:
    trial.setup()
    return steps(trial)


def steps(trial: Trial) -> Rows:
    rows = []
    while trial.stop_reason is None:
        row = trial.step()
        if row is not None:
            rows.append(row)
    return rows


def plainly(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in MEASURED_COLUMNS}


def measured(row: dict[str, Any]) -> dict[str, float]:
    """Return what a row measured on the search and test splits, as a retraining names it."""
    return {f"retrained_{k}": v for k, v in row.items() if k.startswith(("search_", "test_"))}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eval_every", [1, 2])
def test_the_value_is_the_least_and_what_is_found_is_of_that_moment(
    seed: int, eval_every: int
) -> None:
    budget = Budget(outer_steps=STEPS, eval_every=eval_every)
    trial = selected(budget=budget, seed=seed)
    rows = [row for row in to_the_end(trial) if "search_loss" in row]
    values = [row["search_loss"] for row in rows]
    best = rows[values.index(min(values))]["step"]  # the earliest among equals
    assert trial.value == min(values)
    assert rows[-1]["best_step"] == best
    for number, row in enumerate(rows, 1):
        assert row["best_value"] == min(values[:number])
    totals = trial.totals()
    assert (totals["best_value"], totals["best_step"]) == (min(values), best)
    # The hyperparameters of that step, from a run that goes no further.
    again = Trial(
        make_clouds,
        WILD,
        Budget(outer_steps=best, eval_every=eval_every),
        seed=seed,
        device="cpu",
        metric="search_loss",
    )
    to_the_end(again)
    assert same(trial.found(), again.found())
    latest = {k: v.clone() for k, v in trial.joint.problem.hyper.state_dict().items()}
    trial.finish()
    assert same(trial.found(), again.found())
    assert same(trial.joint.problem.hyper.state_dict(), latest)  # from which it could go on
    with trial.as_found() as problem:
        assert same(problem.hyper.state_dict(), again.found())


def test_some_best_moments_are_not_the_last() -> None:
    trials = [selected(seed=seed) for seed in range(4)]
    last = [to_the_end(trial)[-1]["best_step"] for trial in trials]
    assert min(last) < STEPS


def test_evaluations_that_are_not_due_add_no_columns() -> None:
    rows = to_the_end(selected(budget=Budget(outer_steps=5, eval_every=3)))
    assert ["best_value" in row for row in rows] == [False, False, True, False, True]


@pytest.mark.parametrize("batches", ["mini", "drop", "full"])
def test_retraining_is_a_plain_training_with_these_hyperparameters_frozen(batches: str) -> None:
    trial = selected(batches)
    to_the_end(trial)
    found = trial.found()

    def with_found(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        problem = make_clouds(config, device, seed, batches=batches)
        problem.hyper.load_state_dict(found)
        return problem

    training = plain(factory=with_found)
    rows = to_the_end(training)
    values = [row["search_loss"] for row in rows]
    best = rows[values.index(min(values))]
    assert trial.retrain() == score(training) == measured(best)
    hypers = fingerprint(training.joint.problem.hypers())
    assert hypers == fingerprint(list(found.values()))  # they stayed frozen
    finished = trial.finish()
    assert (trial.metrics | finished)["retrained_test_loss"] == best["test_loss"]
    assert finished["learned_mean"] == pytest.approx(training.joint.problem.summary()["mean"])


@pytest.mark.parametrize("batches", ["mini", "drop", "full"])
@pytest.mark.parametrize("limited", [False, True])
def test_a_plain_training_is_its_own_retraining(batches: str, limited: bool) -> None:
    coarse = {"decay": 0.1, "factor.weight": 2.0, "factor.bias": 0.5}
    budget = Budget(outer_steps=8, gradient_equivalents=1e6) if limited else None
    factory = CoarselySet(functools.partial(make_clouds, batches=batches), coarse)
    training = plain(factory=factory, budget=budget)
    rows = to_the_end(training)
    assert training.finish().items() >= score(training).items()
    assert training.retrain() == score(training) != {}
    assert not training.retrains
    best = int(rows[-1]["best_step"])
    # A second run that ends there.
    second = plain(factory=factory, budget=Budget(outer_steps=best))
    assert measured(to_the_end(second)[-1]) == score(training)


@pytest.mark.parametrize("kind", [selected, plain])
def test_retraining_costs_nothing(kind: Any) -> None:
    trial = kind()
    rows = to_the_end(trial)
    joint = Trial(
        make_clouds, trial.config, Budget(outer_steps=len(rows)), device="cpu", metric="search_loss"
    )
    joint.setup()
    if kind is plain:
        paid = sum(5 if i % 3 < 2 else 2 for i in range(len(rows))) / 5 + len(rows) * 10 / 3 / 5
    else:
        paid = steps(joint)[-1]["gradient_equivalents"]
    assert rows[-1]["gradient_equivalents"] == pytest.approx(paid)
    before = trial.totals()
    trial.finish()
    assert trial.totals() == before


def test_it_is_retrained_when_the_cost_has_doubled_and_at_the_end() -> None:
    trial = selected("full", config=WILD.updated({"meta_lr": 0.01, "inner_lr": 0.003}))
    rows = to_the_end(trial)
    assert [row["best_step"] for row in rows] == list(range(1, STEPS + 1))  # better all the time
    costs = [row["gradient_equivalents"] for row in rows]
    expected, last = [], 0.0
    for cost in costs:
        expected.append(cost >= RETRAINING_RATIO * last)
        last = cost if expected[-1] else last
    assert [row["retrained_test_loss"] is not None for row in rows] == expected
    assert trial.retrains is (not expected[-1])
    assert trial.retrains == ("retrained_test_loss" in trial.finish())
    assert not trial.retrains
    assert "retrained_test_loss" not in trial.finish()  # it is known already


@pytest.mark.parametrize("by", [0.0, 1e-9])
def test_only_what_is_better_than_the_search_so_far_is_retrained(by: float) -> None:
    free = selected()
    to_the_end(free)
    assert free.value is not None
    barred = selected(incumbent=free.value + by)
    rows = to_the_end(barred)
    assert barred.value == free.value
    known = [row["retrained_test_loss"] for row in rows]
    for row, value in zip(rows, known, strict=True):
        assert value is None or row["best_value"] < free.value + by
    finished = barred.metrics | barred.finish()
    if by == 0.0:
        assert not barred.retrains
        assert known == [None] * STEPS
        assert not any(k.startswith("retrained_") for k in finished)
    else:
        known_of_free = (free.metrics | free.finish())["retrained_test_loss"]
        assert finished["retrained_test_loss"] == known_of_free


def test_patience_ends_a_plain_training() -> None:
    # The first steps are the best: with this learning rate the loss only rises.
    hasty = WILD.updated({"inner_lr": 30.0, "inner_optimizer": "sgd"})
    training = plain(config=hasty, training_steps=EVALUATIONS * 2)
    rows = to_the_end(training)
    assert training.stop_reason is StopReason.DONE
    best = int(rows[-1]["best_step"])
    assert len(rows) == min(best + EARLY_STOPPING_PATIENCE, EVALUATIONS)
    assert len(rows) < EVALUATIONS
    assert training.finish()["retrained_test_loss"] == rows[best - 1]["test_loss"]


def test_intervals_cover_the_training() -> None:
    for length in (1, 2, 19, 20, 21, 39, 40, 1000, 1001):
        training = BaselineTraining(length)
        evaluations, interval = training.length.outer_steps, training.interval
        assert evaluations is not None
        assert 1 <= evaluations <= EVALUATIONS
        assert length <= evaluations * interval < length + interval
        assert training.config(WILD) == WILD.updated({"inner_steps": interval})


@pytest.mark.parametrize("kind", [selected, plain])
@pytest.mark.parametrize("batches", ["mini", "drop"])
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("limited", [False, True])
def test_saved_and_loaded_it_goes_on_to_the_bit(
    kind: Any, batches: str, at: int, limited: bool, tmp_path: Path
) -> None:
    budget = Budget(outer_steps=STEPS, gradient_equivalents=90.0) if limited else None
    make = functools.partial(kind, batches, budget=budget, training_steps=STEPS)
    whole = make()
    rows = to_the_end(whole)
    first = make()
    first.setup()
    begun = [first.step() for _ in range(at)]
    first.save(tmp_path / "saved.pt")
    first.step()  # not to be seen again
    second = make()
    second.setup()
    second.load(tmp_path / "saved.pt")
    ended = begun + steps(second)
    assert [plainly(row) for row in ended] == [plainly(row) for row in rows]
    assert second.finish() == whole.finish()
    assert second.value == whole.value
    assert same(second.found(), whole.found())
    assert second.fingerprint() == whole.fingerprint()


def erring(after: int) -> Any:
    return functools.partial(make_erring, after=after)


@pytest.mark.parametrize(("kind", "calls"), [(selected, 14), (plain, 3)])
def test_a_training_that_breaks_keeps_its_best_moment(kind: Any, calls: int) -> None:
    trial = kind(factory=erring(calls))
    rows = to_the_end(trial)
    assert trial.stop_reason is StopReason.NONFINITE
    assert len(rows) >= 2
    assert trial.value == min(row["search_loss"] for row in rows)
    finished = trial.metrics | trial.finish()
    finished = {k: v for k, v in finished.items() if k.startswith(("retrained_", "learned_"))}
    assert math.isfinite(finished["retrained_test_loss"])
    assert finished.pop("learned_words").startswith("weight decay: ")
    assert all(math.isfinite(v) for v in finished.values())


@pytest.mark.parametrize("kind", [selected, plain])
def test_a_training_that_breaks_at_once_finds_nothing(kind: Any) -> None:
    trial = kind(factory=erring(0))
    assert to_the_end(trial) == []
    assert trial.stop_reason is StopReason.NONFINITE
    assert trial.value is None
    assert trial.finish() == {}
    assert not trial.retrains
    assert "best_value" not in trial.totals()


class BreaksLater:
    """Makes a problem that is right the first times, and not finite from then on."""

    def __init__(self, right: int) -> None:
        self.left = right

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        self.left -= 1
        if self.left >= 0:
            return make_clouds(config, device, seed)
        return make_erring(config, device, seed, after=0)


def test_hyperparameters_that_cannot_be_retrained_have_no_score() -> None:
    # One problem for the trial, one for the retraining after its first evaluation.
    trial = selected(
        config=WILD.updated({"meta_lr": 0.01, "inner_lr": 0.01}), factory=BreaksLater(2)
    )
    rows = to_the_end(trial)
    assert rows[0]["retrained_test_loss"] is not None
    assert [row["retrained_test_loss"] for row in rows[1:]] == [None] * (STEPS - 1)
    assert trial.retrains
    finished = trial.finish()
    # The score of the first evaluation says nothing about the best one.
    assert (trial.metrics | finished).get("retrained_test_loss") is None


def test_a_trial_that_cannot_pay_a_step_is_over_before_it_begins() -> None:
    for kind in (selected, plain):
        trial = kind(budget=Budget(gradient_equivalents=0.5))
        trial.setup()
        assert trial.stop_reason is StopReason.PRUNED
        assert trial.finish() == {}
        assert trial.totals()["gradient_equivalents"] == 0.0


def test_the_tables_say_what_a_plain_training_was_given() -> None:
    training = plain(given={"knob.decay": 0.5})
    constants = training.constants()
    assert constants["knob.decay"] == 0.5
    assert constants["inner_lr"] == WILD.inner_lr
    assert constants["inverse"] is None
    assert constants["meta_lr"] is None
    assert constants["seed"] == 0


def test_a_selection_is_not_shared_between_trials() -> None:
    selection = BestEvaluation()
    one, other = (
        Trial(make_clouds, WILD, Budget(outer_steps=1), device="cpu", selection=selection)
        for _ in range(2)
    )
    to_the_end(one)
    other.setup()
    assert one.value is not None
    assert other.value is None


def test_the_policies_may_be_combined_freely() -> None:
    """Plain training that is retrained at its end, for as long: the same training, to the bit."""
    trial = Trial(
        make_clouds,
        WILD,
        BaselineTraining(8).length,
        device="cpu",
        metric="search_loss",
        training=BaselineTraining(8),
        selection=BestModel(),
    )
    rows = to_the_end(trial)
    assert len(rows) == 8
    best = min(rows, key=lambda row: row["search_loss"])
    assert trial.value == best["search_loss"]
    assert trial.retrain()["retrained_test_loss"] == best["test_loss"]
    stopped = Trial(
        make_clouds,
        WILD.updated({"meta_lr": 30.0, "inner_lr": 30.0}),
        Budget(outer_steps=50),
        device="cpu",
        metric="search_loss",
        training=JointTraining(),
        selection=BestEvaluation(patience=2),
    )
    rows = to_the_end(stopped)
    assert stopped.stop_reason is StopReason.DONE
    assert len(rows) == rows[-1]["best_step"] + 2 < 50


def test_nonsense_is_refused_when_a_policy_is_made() -> None:
    with pytest.raises(UsageError, match="training_steps must be"):
        BaselineTraining(0)
    with pytest.raises(UsageError, match="patience must be"):
        BestEvaluation(patience=0)


def test_a_checkpoint_of_before_there_were_policies_goes_on() -> None:
    """`old_trial.pt` was saved after three steps by the class that this selection replaces."""
    whole, resumed = selected(), selected()
    rows = to_the_end(whole)
    resumed.setup()
    resumed.load(Path(__file__).parent / "old_trial.pt")
    again = steps(resumed)
    assert [row["step"] for row in again] == list(range(4, STEPS + 1))
    for row, expected in zip(again, rows[3:], strict=True):
        known = plainly(expected).items()  # it had taken no check at the start
        numbers = {k: v for k, v in known if isinstance(v, float) and k != "start_check_gradients"}
        # Not to the bit: of another machine, perhaps, and its α was from another estimate of λ_max.
        near = pytest.approx(numbers, rel=5e-3, abs=1e-3, nan_ok=True)
        assert {k: row[k] for k in numbers} == near
    assert (resumed.metrics["best_step"], resumed.retrains) == (
        whole.metrics["best_step"],
        whole.retrains,
    )
