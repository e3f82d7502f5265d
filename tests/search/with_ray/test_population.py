"""Members of a population that end before their last step: by patience, a limit, or a death."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers.pbt import _PBTTrialState
from small_problems import CONFIG, make_quadratic, make_tiny

from ift_tune import Budget, Callback, MetaConfig, load_results
from ift_tune.base.errors import WorkerError
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray import IFTTrainable, ray_trainable, run_ray
from ift_tune.search.ray import settings as schedulers
from ift_tune.search.ray.settings import make_scheduler
from ift_tune.search.space import Choice, Float, MetaSpace
from ift_tune.testing import Quadratic
from ift_tune.trial.plan import TrialPlan
from with_ray.ray_problems import fit, make_eventful_at, run_out_of_memory

SPACE = MetaSpace({"meta_lr": Float(1e-3, 5.0, log=True)})
LENGTH = 6
TOO_FAST = 3.0  # of λ: the first evaluation is the best
MORTAL = 2.0  # of the problem whose process dies


def member(meta_lr: float, trial_id: str = "a", **limits: Any) -> Any:
    budget = Budget(**{"outer_steps": LENGTH, "patience": 2, "retrain": False} | limits)
    kind = ray_trainable(make_quadratic, SPACE, budget, device="cpu", iterations=LENGTH)
    made = kind(config={"meta_lr": meta_lr})
    made._session.trial_id = trial_id
    return made


def rows_of(result: dict[str, Any]) -> list[int]:
    return [row["step"] for row in json.loads(result["record"])["rows"]]


LIMITS: dict[str, dict[str, Any]] = {
    "patience": {},
    "cost": {"patience": None, "gradient_equivalents": 150.0},
    "time": {"patience": None, "seconds": 1e-9},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_member_that_is_over_waits_for_its_last_result_with_its_latest_value(limit: str) -> None:
    one = member(TOO_FAST, **LIMITS[limit], retrain=True)
    results = [one.train() for _ in range(LENGTH)]
    stopped = max(result["outer_step"] for result in results)
    assert stopped < LENGTH
    assert [step for result in results for step in rows_of(result)] == [*range(1, stopped + 1)]
    assert [result["done"] for result in results] == [False] * (LENGTH - 1) + [True]
    assert [result["stop_reason"] for result in results] == [""] * (LENGTH - 1) + ["done"]
    latest = [result["latest_objective"] for result in results]
    assert latest[stopped - 1 :] == latest[stopped - 1 : stopped] * (LENGTH - stopped + 1)
    solved = [result["solve_status"] != "" for result in results[:-1]]
    assert solved == [True] * stopped + [False] * (LENGTH - 1 - stopped)
    # Trained again once, at the end: what another member overwrites is not worth it.
    retrained = [json.loads(result["record"])["retrained"] is not None for result in results]
    assert retrained == [False] * (LENGTH - 1) + [True]
    assert ["retrained_test_loss" in result for result in results] == retrained


def test_the_latest_value_of_a_member_that_has_run_out_of_patience_is_not_its_best() -> None:
    one = member(TOO_FAST)
    results = [one.train() for _ in range(LENGTH)]
    assert results[-1]["outer_step"] == 3
    assert results[-1]["objective"] == results[0]["latest_objective"]
    assert results[-1]["latest_objective"] == results[2]["search_loss"] > results[-1]["objective"]


def test_signal_patience_ends_a_member_no_earlier_either() -> None:
    config = CONFIG.updated({"signal_every": 1, "signal_patience": 1})
    budget = Budget(outer_steps=40, retrain=False)
    kind = ray_trainable(
        make_tiny, SPACE, budget, config=config, device="cpu", iterations=budget.outer_steps or 0
    )
    trial: Any = kind(config={"meta_lr": 0.05})
    results = [trial.train() for _ in range(40)]
    assert results[-1]["outer_step"] < 40
    assert [result["done"] for result in results] == [False] * 39 + [True]


def test_a_waiting_member_waits_on_after_a_restoration(tmp_path: Path) -> None:
    one, other = member(TOO_FAST), member(TOO_FAST)
    begun = [one.train() for _ in range(4)]
    other.restore(one.save(str(tmp_path)))
    rest = [other.train() for _ in range(2)]
    assert [rows_of(result) for result in rest] == [[], []]
    assert [result["done"] for result in rest] == [False, True]
    assert rest[-1]["latest_objective"] == begun[-1]["latest_objective"]


def test_a_waiting_member_that_takes_over_a_better_one_goes_on(tmp_path: Path) -> None:
    heir, donor = member(TOO_FAST, "heir"), member(0.05, "donor")
    for _ in range(4):
        heir.train()
        donor.train()
    heir.restore(donor.save(str(tmp_path)))
    results = [heir.train() for _ in range(2)]
    assert [rows_of(result) for result in results] == [[5], [6]]
    assert json.loads(results[0]["record"])["exploited"] == "donor"
    assert (results[-1]["done"], results[-1]["stop_reason"]) == (True, "done")


def test_a_member_that_was_thrown_back_ends_with_the_others(tmp_path: Path) -> None:
    """As Ray's own scheduler throws members back, to the state of one that had stopped."""
    heir, donor = member(0.05, "heir", retrain=True), member(TOO_FAST, "donor")
    for _ in range(4):
        heir.train()
        donor.train()
    heir.restore(donor.save(str(tmp_path)))
    results = [heir.train() for _ in range(2)]
    assert [rows_of(result) for result in results] == [[4], [5]]
    assert (results[-1]["done"], results[-1]["stop_reason"]) == (True, "done")
    assert "retrained_test_loss" in results[-1]


def test_a_member_without_room_from_the_first_is_saved_and_loaded_as_the_others(
    tmp_path: Path,
) -> None:
    factory = functools.partial(make_eventful_at, events={0.05: run_out_of_memory}, after=0)
    kind = ray_trainable(factory, SPACE, Budget(outer_steps=3), device="cpu", iterations=3)
    trial: Any = kind(config={"meta_lr": 0.05})
    results = []
    for n in range(3):
        results.append(trial.train())
        saved = trial.save(str(tmp_path / str(n)))
        trial = kind(config={"meta_lr": 0.05})
        trial.restore(saved)
    assert [result["stop_reason"] for result in results] == ["", "", "oom"]
    assert [result["done"] for result in results] == [False, False, True]


# The scheduler


class Member:
    """What the scheduler looks at of one of Ray's trials."""

    experiment_tag = ""

    def __init__(self, results: int, step: int, status: str = "PAUSED") -> None:
        self.results, self.step, self.status = results, step, status

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


def population(*members: Member) -> tuple[Any, Any]:
    """Return the scheduler of a population, four outer steps a round, and Ray's controller."""
    budget = Budget(outer_steps=20, eval_every=2)
    plan = SearchPlan(TrialPlan(make_quadratic, budget, device="cpu"), SPACE)
    made: Any = make_scheduler("pbt", plan)
    states: Any = made._trial_state
    for one in members:
        state: Any = _PBTTrialState(one)  # type: ignore[arg-type]
        state.last_train_time = one.results
        state.last_result = {"outer_step": one.step}
        states[one] = state
    live = {one for one in members if not one.is_finished()}
    controller = SimpleNamespace(get_trials=lambda: [*members], get_live_trials=lambda: live)
    return made, controller


@pytest.mark.parametrize(
    ("heir", "donor", "exploits"),
    [
        ((4, 8), (4, 8), True),
        ((4, 6), (4, 8), True),  # one that has stopped, or diverged
        ((4, 8), (4, 6), False),  # to an older state
        ((4, 4), (4, 6), True),  # both have stopped
        ((4, 6), (4, 4), False),
        ((4, 8), (6, 12), False),  # after they were resumed
        ((6, 12), (4, 8), False),
    ],
)
def test_only_members_that_are_as_far_or_further_are_copied(
    heir: tuple[int, int], donor: tuple[int, int], exploits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(PopulationBasedTraining, "_exploit", lambda *a: copied.append(a[2:]))
    trial, other = Member(*heir), Member(*donor)
    scheduler, controller = population(trial, other)
    scheduler._exploit(controller, trial, other)
    assert copied == ([(trial, other)] if exploits else [])


def test_a_round_ends_though_the_one_that_all_waited_for_is_gone() -> None:
    here, there, late = Member(2, 4), Member(2, 4), Member(0, 0, "RUNNING")
    scheduler, controller = population(here, there, late)
    scheduler._next_perturbation_sync = 2
    assert scheduler.choose_trial_to_run(controller) is None  # it may still arrive
    assert scheduler._next_perturbation_sync == 2
    late.status = "ERROR"  # which is among Ray's live trials for all that
    assert scheduler.choose_trial_to_run(controller) in (here, there)
    assert scheduler._next_perturbation_sync == 4
    assert scheduler._trial_state[late].last_train_time == 4  # so nobody waits for it


# Whole populations


class Retrainings(Callback):
    """Notes whose retraining is heard of."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_retraining(self, number: int, steps: int) -> None:
        self.numbers.append(number)


@pytest.mark.nightly
def test_a_population_with_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedulers, "_PERTURBATIONS", 2)
    heard = Retrainings()
    result = run_ray(
        make_quadratic,
        MetaSpace({"meta_lr": Float(0.5, 5.0, log=True)}),
        Budget(outer_steps=LENGTH, patience=1),
        n_trials=4,
        out=tmp_path,
        device="cpu",
        scheduler="pbt",
        callbacks=[heard],
    )
    assert list(result.trials["status"]) == ["complete"] * 4
    assert result.trials["step"].min() < LENGTH
    assert sorted(heard.numbers) == [0, 1, 2, 3]
    assert not result.steps.duplicated(["trial", "step"]).any()


@pytest.mark.nightly
def test_a_population_of_ones_own_with_patience_ends(tmp_path: Path) -> None:
    budget = Budget(outer_steps=LENGTH, patience=2, retrain=False)
    kind: type[IFTTrainable] = ray_trainable(
        make_quadratic, SPACE, budget, device="cpu", iterations=LENGTH
    )
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        hyperparam_mutations=SPACE.to_ray(),
        custom_explore_fn=SPACE.clipped,
        synch=True,
        log_config=False,
    )
    aim: dict[str, Any] = {
        "reuse_actors": True,
        "scheduler": scheduler,
        "metric": "latest_objective",
        "num_samples": 4,
    }
    results = fit(kind, tmp_path, SPACE.to_ray(), run={"checkpoints_kept": 4}, **aim)
    assert not results.errors
    tables = load_results(tmp_path / "ray")
    assert list(tables.trials["stop_reason"]) == ["done"] * 4
    assert not tables.steps.duplicated(["trial", "step"]).any()


class Mortal(Quadratic):
    """Its process dies when it is measured."""

    def metrics(self, batch: Any) -> dict[str, float]:
        os._exit(1)


def make_mortal(config: MetaConfig, device: torch.device, seed: int) -> Quadratic:
    """Return a mortal problem to the members of one rate, and to others one that is not."""
    return Mortal(seed=0) if config.meta_lr == MORTAL else Quadratic(seed=0)


@pytest.mark.nightly
def test_a_population_goes_on_without_the_member_whose_process_always_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedulers, "_PERTURBATIONS", 2)
    with pytest.raises(WorkerError, match="the processes of 1 trials died too often"):
        run_ray(
            make_mortal,
            MetaSpace({"meta_lr": Choice((0.1, 0.2, MORTAL))}),
            Budget(outer_steps=LENGTH, retrain=False),
            n_trials=4,
            out=tmp_path,
            device="cpu",
            scheduler="pbt",
            seed=2,  # draws the mortal rate for the first member alone
        )
    trials = load_results(tmp_path).trials
    assert list(trials["status"]) == ["failed", "complete", "complete", "complete"]
    assert list(trials["step"])[1:] == [LENGTH] * 3
