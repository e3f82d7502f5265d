"""Driving a trial: its record, its callbacks, interruption and resumption."""

from __future__ import annotations

import functools
import gc
import json
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import (
    BUDGET,
    CONFIG,
    assert_same_tensors,
    comparable,
    make_faulty,
    make_tiny,
)
from torch import nn

from ift_tune import BilevelProblem, Budget, MetaConfig
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.errors import CheckpointError
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import Callback
from ift_tune.trial import runner
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.runner import run_trial
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import Trial


class Diary(Callback):
    """Notes what it is told; `stop_at` is a step at which the process is killed, as it were."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[tuple[Any, ...]] = []
        self._stop_at = stop_at

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self.notes.append(("started", number, first_step))

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self.notes.append(("step", number, row["step"]))
        if row["step"] == self._stop_at:
            raise KeyboardInterrupt

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        self.notes.append(("ended", number, outcome.stop_reason))


def tiny(budget: Budget = BUDGET) -> Trial:
    return Trial(make_tiny, CONFIG, budget, device="cpu")


def faulty(fault: str, after: int) -> Trial:
    factory = functools.partial(make_faulty, fault=fault, after=after)
    return Trial(factory, CONFIG, BUDGET, device="cpu")


def record_in(path: Path) -> TrialRecord:
    return RunDirectory(path, resume=True).trial(0)


def test_without_a_record_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_trial(tiny(), 0)
    assert outcome.stop_reason is StopReason.DONE
    assert list(tmp_path.iterdir()) == []


def test_the_outcome_has_the_metric_and_everything_measured() -> None:
    outcome = run_trial(tiny(), 0)
    assert outcome.metric == "search_error"
    assert outcome.value == outcome.metrics["search_error"]
    assert {"retrained_test_error", "learned_mean", "test_loss"} <= set(outcome.metrics)
    assert outcome.metrics["step"] == 4


def test_callbacks_are_called_in_order() -> None:
    diary = Diary()
    run_trial(tiny(Budget(outer_steps=2)), 7, callbacks=[diary])
    assert diary.notes == [
        ("started", 7, 0),
        ("step", 7, 1),
        ("step", 7, 2),
        ("ended", 7, StopReason.DONE),
    ]


def test_a_record_holds_settings_rows_and_the_found_hyperparameters(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    trial = tiny()
    hypers: list[torch.Tensor] = []

    class Keep(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            hypers[:] = [h.detach().clone() for h in trial.joint.problem.hypers()]

    run_trial(trial, 0, record=record, facts={"task": "tiny"}, callbacks=[Keep()])
    facts = record.facts()
    assert facts["status"] == "complete"
    assert facts["stop_reason"] == "done"
    assert facts["task"] == "tiny"
    assert set(MetaConfig.flat_keys()) <= set(facts)
    assert {k: v for k, v in facts.items() if k in CONFIG.to_flat()} == CONFIG.to_flat()
    assert list(record.steps()["step"]) == [1, 2, 3, 4]
    assert not record.checkpoint.exists()
    found = load_checkpoint(record.path / "hyperparameters.pt")
    assert_same_tensors(list(found.values()), hypers)


@pytest.mark.parametrize(
    ("trial", "reason", "status"),
    [
        (faulty("nan", 6), StopReason.NONFINITE, "pruned"),
        (faulty("oom", 6), StopReason.OOM, "pruned"),
    ],
)
def test_a_trial_that_goes_wrong_ends_and_keeps_its_rows(
    trial: Trial, reason: StopReason, status: str, tmp_path: Path
) -> None:
    record = record_in(tmp_path)
    outcome = run_trial(trial, 0, record=record)
    assert outcome.stop_reason is reason
    assert outcome.value == record.steps()["search_error"].iloc[-1]
    assert (record.facts()["status"], record.facts()["stop_reason"]) == (status, reason.value)
    assert list(record.steps()["step"]) == [1, 2]
    assert not (record.path / "hyperparameters.pt").exists()


def test_an_exception_propagates_after_the_record_and_the_callbacks_know(tmp_path: Path) -> None:
    record, diary = record_in(tmp_path), Diary()
    with pytest.raises(RuntimeError, match="a mistake in the user's problem"):
        run_trial(faulty("bug", 6), 0, record=record, callbacks=[diary])
    assert diary.notes[-1] == ("ended", 0, StopReason.FAILED)
    assert (record.facts()["status"], record.facts()["stop_reason"]) == ("failed", "failed")
    assert list(record.steps()["step"]) == [1, 2]


@pytest.mark.parametrize("fault", ["nan", "oom"])
def test_a_retraining_that_goes_wrong_is_an_end_and_no_exception(fault: str) -> None:
    built: list[BilevelProblem] = []

    def factory(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        built.append(make_faulty(config, device, seed, fault=fault, after=12 - 10 * len(built)))
        return built[-1]

    outcome = run_trial(Trial(factory, CONFIG, BUDGET, device="cpu"), 0)
    assert len(built) == 2
    assert outcome.metrics["step"] == 4
    assert outcome.stop_reason in (StopReason.DONE, StopReason.NONFINITE, StopReason.OOM)
    assert "retrained_test_error" not in outcome.metrics


def test_pruning_is_asked_at_evaluated_steps_only() -> None:
    asked: list[tuple[float, int]] = []

    def should_prune(value: float, step: int) -> bool:
        asked.append((value, step))
        return step >= 4

    diary = Diary()
    budget = Budget(outer_steps=9, eval_every=2)
    outcome = run_trial(tiny(budget), 0, should_prune=should_prune, callbacks=[diary])
    assert outcome.stop_reason is StopReason.PRUNED
    assert [step for _, step in asked] == [2, 4]
    assert outcome.value == asked[-1][0]
    assert outcome.metrics["step"] == 4
    assert "retrained_test_error" not in outcome.metrics


def test_a_request_to_stop_is_heeded_after_the_step_and_saved(tmp_path: Path) -> None:
    record, interrupt = record_in(tmp_path), Interrupt()

    class Stop(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            interrupt.requested = row["step"] == 2

    first = run_trial(tiny(), 0, record=record, callbacks=[Stop()], interrupt=interrupt)
    assert first.stop_reason is StopReason.INTERRUPTED
    assert record.facts()["status"] == "interrupted"
    assert record.checkpoint.exists()
    diary = Diary()
    second = run_trial(tiny(), 0, record=record, callbacks=[diary])
    assert diary.notes[0] == ("started", 0, 2)
    assert second.stop_reason is StopReason.DONE
    assert without_time(second) == without_time(run_trial(tiny(), 0))
    assert list(record.steps()["step"]) == [1, 2, 3, 4]


def test_a_request_to_stop_during_the_last_step_comes_too_late() -> None:
    interrupt = Interrupt()
    interrupt.requested = True
    outcome = run_trial(tiny(Budget(outer_steps=1)), 0, interrupt=interrupt)
    assert outcome.stop_reason is StopReason.DONE


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_killed_trial_goes_on_from_its_checkpoint_or_begins_again(
    every_step: bool, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, record = record_in(tmp_path / "a"), record_in(tmp_path / "b")
    run_trial(tiny(), 0, record=undisturbed)
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0 if every_step else 1e9)
    with pytest.raises(KeyboardInterrupt):
        run_trial(tiny(), 0, record=record, callbacks=[Diary(stop_at=killed_at)])
    assert record.facts()["status"] == "running"
    with (record.path / "steps.csv").open("a") as file:
        file.write("5,0.1,0.2")  # the row that the kill tore apart
    diary = Diary()
    run_trial(tiny(), 0, record=record, callbacks=[diary])
    assert diary.notes[0] == ("started", 0, killed_at if every_step else 0)
    expected = undisturbed.facts()
    assert record.facts() | {"wall_seconds": expected["wall_seconds"]} == expected
    assert comparable(record.steps()).equals(comparable(undisturbed.steps()))
    assert not record.checkpoint.exists()


def test_rows_after_the_checkpoint_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, record = record_in(tmp_path / "a"), record_in(tmp_path / "b")
    run_trial(tiny(), 0, record=undisturbed)
    saved = iter([1e9, -1.0, 1e9])  # only step 2 is saved

    class Kill(Diary):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0 if row["step"] == 1 else 1e9)
            super().on_trial_step(number, row)

    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", next(saved))
    with pytest.raises(KeyboardInterrupt):
        run_trial(tiny(), 0, record=record, callbacks=[Kill(stop_at=3)])
    assert list(record.steps()["step"]) == [1, 2, 3]
    diary = Diary()
    run_trial(tiny(), 0, record=record, callbacks=[diary])
    assert diary.notes[:2] == [("started", 0, 2), ("step", 0, 3)]
    assert comparable(record.steps()).equals(comparable(undisturbed.steps()))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record.write("checkpoint.pt", b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"(?s)checkpoint\.pt.*delete it"):
        run_trial(tiny(), 0, record=record)


def test_the_problem_is_let_go_of() -> None:
    models: list[weakref.ref[nn.Module]] = []

    def factory(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        problem = make_tiny(config, device, seed)
        models.append(weakref.ref(problem.model))
        return problem

    trial = Trial(factory, CONFIG, BUDGET, device="cpu")
    run_trial(trial, 0)
    gc.collect()
    assert [model() for model in models] == [None, None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupt = Interrupt()
    with interrupt.listening():
        signal.raise_signal(number)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_handlers_are_put_back_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), Interrupt().listening():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_no_handler_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with Interrupt().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def without_time(outcome: Outcome) -> dict[str, Any]:
    metrics = {k: v for k, v in outcome.metrics.items() if k != "wall_seconds"}
    json.dumps(metrics)  # plain values
    return metrics


def test_a_patient_interrupt_lets_further_signals_pass() -> None:
    interrupt = Interrupt(patient=True)
    with interrupt.listening([signal.SIGTERM]):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested


def test_an_interrupt_hands_on_the_first_signal() -> None:
    seen: list[str] = []
    interrupt = Interrupt(patient=True, then=lambda: seen.append("now"))
    with interrupt.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert seen == ["now"]
