"""What all trials of a search have in common, and what drives one of them to its end."""

from __future__ import annotations

import contextlib
import copy
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ift_tune.base.arguments import require_seed
from ift_tune.base.checkpoints import drop_generations, load_latest
from ift_tune.base.direction import Direction, chosen_metric
from ift_tune.base.errors import CheckpointError, EnvironmentFaultError
from ift_tune.base.faults import surroundings
from ift_tune.base.identity import factory_name
from ift_tune.base.objectives import Names, Objectives
from ift_tune.base.randomness import RandomStream
from ift_tune.base.status import (
    NUMBER_COLUMNS,
    PEAK_MEMORY,
    Outcome,
    StopReason,
    found_at_the_end,
)
from ift_tune.joint.callbacks import Callback, CallbackList, joint_callbacks
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.batches import Batch, to_device
from ift_tune.problem.evaluation import as_numbers, measured
from ift_tune.problem.factory import build_problem, require_factory
from ift_tune.problem.loaders import first_batch
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_loss, as_penalty, as_words
from ift_tune.trial.record import TrialRecord, TrialWriter, save_found
from ift_tune.trial.team import require_processes
from ift_tune.trial.trial import (
    OUT_OF_MEMORY,
    Half,
    ProblemFactory,
    Trial,
    finished,
    require_trial,
)

CHECKPOINT_SECONDS = 20.0  # what a kill can cost of a trial

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialPlan:
    """Makes trials that differ in some meta-hyperparameters. Picklable when its factory is.

    Attributes:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        budget: Length of each trial.
        config: What does not vary.
        seed: Of every trial's problem: all trials see the same splits and initial weights.
        device: Where trials run.
        metric: The search metric that decides, see `Trial`; or several, see `Objectives`.
        mode: ``"min"`` or ``"max"``, see `Trial`; for several metrics, one for each.
        callbacks: Those of the given ones that override a hook of the optimisation: each trial's
            process has them.
        constraints: Such as ``"alpha_lambda_max<=2"``: what the best trial has to keep.
        processes: How many share each trial, see `Trial`; no number depends on it, to rounding.

    Raises:
        UsageError: If the factory cannot be called, a callback is none, or metric, mode and
            constraints do not go together.
    """

    problem_factory: ProblemFactory
    budget: Budget
    config: MetaConfig = field(default_factory=MetaConfig)
    seed: int = 0
    device: str = "auto"
    metric: Names = None
    mode: Names = None
    callbacks: Sequence[Callback] = ()
    constraints: Sequence[str] = ()
    processes: int = 1

    def __post_init__(self) -> None:
        require_factory(self.problem_factory)
        require_processes(self.processes)
        require_trial(self.config, self.budget, self.objectives.metric)
        object.__setattr__(self, "seed", require_seed(self.seed))
        # The others may hold what cannot be pickled, such as a terminal.
        object.__setattr__(self, "callbacks", joint_callbacks(self.callbacks))

    @property
    def objectives(self) -> Objectives:
        """What the search is after."""
        return Objectives.of(self.metric, self.mode, self.constraints)

    @property
    def direction(self) -> Direction:
        """In which the metric that decides within a trial is better."""
        return self.objectives.direction

    def trial(
        self, changes: Mapping[str, Any] | None = None, device: str | torch.device | None = None
    ) -> Trial:
        """Return a trial, not yet set up.

        Args:
            changes: Flat `MetaConfig` keys in which it differs from `config`.
            device: Where it runs; default: the plan's.

        Raises:
            UsageError: If a key or value is wrong.
        """
        return Trial(
            self.problem_factory,
            self.config.updated(changes or {}),
            self.budget,
            seed=self.seed,
            device=self.device if device is None else device,
            metric=self.objectives.metric,
            mode=self.direction.value,
            callbacks=self.callbacks,
            processes=self.processes,
        )

    def check(self, device: torch.device, changes: Mapping[str, Any] | None = None) -> None:
        """Build the problem once, for nothing: mistakes and missing data show before anything runs.

        Args:
            device: Where.
            changes: Flat `MetaConfig` keys in which its configuration differs from `config`.

        Raises:
            UsageError: If the problem is not right.
        """
        config = self.config.updated(changes or {})
        problem = build_problem(self.problem_factory, config, device, self.seed)
        objectives = self.objectives
        columns = check_problem(problem, objectives.metric)
        if self.processes > 1:
            shared = self.trial(changes, device)
            try:
                shared.setup()  # which looks at the shares
            finally:
                shared.cleanup()
        if not self.callbacks:  # they may add columns of their own
            told = self.device != "cpu" and torch.cuda.device_count()
            objectives.check(columns - (set() if told else {PEAK_MEMORY}))

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides the numbers, but for the device."""
        return {
            "factory": factory_name(self.problem_factory),
            "seed": self.seed,
            "config": self.config.to_flat(),
            "budget": self.budget.to_plain(),
            **self.objectives.settings(),
        }


def check_problem(problem: BilevelProblem, metric: str | None) -> set[str]:
    """Look for mistakes in a problem, on one batch of its search split.

    Args:
        problem: It stays as it is.
        metric: The search metric; see `Trial`.

    Returns:
        The columns that a trial's row has numbers in, those of the test split aside.

    Raises:
        UsageError: If the problem is not right, or does not measure the metric.
    """
    problem.validate()
    device = problem.weights()[0].device
    # Loaders and metrics may draw; what the caller draws afterwards does not depend on that.
    with RandomStream(0, device).aside():
        firsts = {
            name: to_device(first_batch(name, loader), device)
            for name, loader in vars(problem.splits).items()
            if loader is not None
        }
        _check_losses(problem, firsts)
        learned = as_numbers(problem.summary(), "summary")
        as_words(problem.words())
        with evaluating(problem.model):
            found = measured(lambda: problem.evaluate([firsts["search"]]))
    chosen_metric(metric, {f"search_{name}" for name in found})
    columns = {f"{split}_{name}" for split in ("train", "val", "search") for name in found}
    return columns | {f"learned_{name}" for name in learned} | set(NUMBER_COLUMNS)


def _check_losses(problem: BilevelProblem, batches: Mapping[str, Batch]) -> None:
    """Look at what the losses and the penalty return; the problem stays as it is.

    Raises:
        UsageError: If one returns something else than it shall.
    """
    again = copy.copy(problem)  # so that a loss that counts its calls counts those of training
    as_penalty(again.penalty())
    with contextlib.suppress(*OUT_OF_MEMORY):
        with preserved_buffers(problem.model):
            as_loss(again.train_loss(batches["train"]), "train_loss")
        with evaluating(problem.model):
            as_loss(again.val_loss(batches["val"]), "val_loss")


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request that is heeded between outer steps."""

    def __init__(self, *, patient: bool = False, then: Callable[[], object] | None = None) -> None:
        """Take what a signal does.

        Args:
            patient: Whether a second signal is let pass; else it interrupts at once.
            then: Called at the first signal.
        """
        self.requested = False
        self._patient, self._then = patient, then

    @contextlib.contextmanager
    def listening(
        self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    ) -> Iterator[Interrupt]:
        """Listen for the signals, in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            if self._patient:
                return
            raise KeyboardInterrupt
        self.requested = True
        if self._then is not None:
            self._then()


def run_trial(
    trial: Trial,
    number: int,
    *,
    record: TrialRecord | None = None,
    facts: dict[str, Any] | None = None,
    should_prune: Callable[[float, int], bool] | None = None,
    callbacks: Sequence[Callback] = (),
    interrupt: Interrupt | None = None,
    goes_on: bool = False,
) -> Outcome:
    """Run a trial from its start, or from the checkpoint in its record, to its end.

    Args:
        trial: Not yet stepped; it is set up if it is not.
        number: Its number, for the callbacks.
        record: Where rows and checkpoints go; nothing is written without it.
        facts: Constants of the trial's rows.
        should_prune: Told each evaluated value and its step; says whether to stop there.
        callbacks: Their hooks of the search are called; those of the optimisation are called by
            the trial, of the callbacks that it was made with.
        interrupt: Looked at between outer steps.
        goes_on: Whether the checkpoint of its last step is kept, so that it can be gone on with.

    Raises:
        Exception: Whatever the problem raises, after the record says ``failed``.
        EnvironmentFaultError: If the environment let go; the trial goes on when it is resumed.
    """
    return finished(
        halves_of_trial(
            trial,
            number,
            record=record,
            facts=facts,
            should_prune=should_prune,
            callbacks=callbacks,
            interrupt=interrupt,
            goes_on=goes_on,
        )
    )


def halves_of_trial(
    trial: Trial,
    number: int,
    *,
    record: TrialRecord | None = None,
    facts: dict[str, Any] | None = None,
    should_prune: Callable[[float, int], bool] | None = None,
    callbacks: Sequence[Callback] = (),
    interrupt: Interrupt | None = None,
    goes_on: bool = False,
) -> Generator[Half, None, Outcome]:
    """Run a trial likewise, by the halves of its steps; see `Trial.halves`."""
    callback, interrupt = CallbackList(callbacks), interrupt or Interrupt()
    progress = None if record is None else _Progress(trial, record, facts or {}, goes_on)
    try:
        with surroundings(f"trial {number}"):
            if not trial.ready:
                trial.setup()
            if progress is not None:
                progress.begin()
            callback.on_trial_begin(number, trial.config, trial.joint.outer_steps)
            yield from _step_to_the_end(trial, number, progress, should_prune, callback, interrupt)
            if trial.stop_reason is not StopReason.INTERRUPTED:
                if progress is not None and goes_on:
                    progress.save()
                if trial.retrains:
                    callback.on_retraining(number, trial.joint.inner_steps)
                    yield from trial.halves_of_retraining()
                trial.metrics |= trial.finish()
            if progress is not None and trial.keeps:
                progress.keep()
    except OUT_OF_MEMORY:
        trial.stop_reason = StopReason.OOM
    except EnvironmentFaultError:
        trial.cleanup()  # and nothing else: the record says "running", as after a kill
        raise
    except Exception:
        trial.stop_reason = StopReason.FAILED
        _end(trial, number, progress, callback)
        raise
    return _end(trial, number, progress, callback)


def _end(trial: Trial, number: int, progress: _Progress | None, callback: Callback) -> Outcome:
    reason = trial.stop_reason or StopReason.FAILED
    if progress is not None:
        progress.end(reason)
    _log.info("trial %d ended: %s", number, reason.value)
    found = trial.metrics | trial.totals()
    outcome = Outcome(reason, trial.value, trial.metric, found, trial.direction.value)
    trial.cleanup()
    try:
        callback.on_trial_end(number, outcome)
    except Exception:
        if progress is not None:  # whoever called sees a failure, and the tables say the same
            progress.end(StopReason.FAILED)
        raise
    return outcome


def _step_to_the_end(
    trial: Trial,
    number: int,
    progress: _Progress | None,
    should_prune: Callable[[float, int], bool] | None,
    callback: Callback,
    interrupt: Interrupt,
) -> Generator[Half, None, None]:
    while trial.stop_reason is None:
        row = yield from trial.halves()
        if row is None:
            return
        if progress is not None:
            progress.append(row)
        if trial.metric in row and should_prune is not None:
            prune = should_prune(row[trial.metric], row["step"])
            if prune and trial.stop_reason is None:
                trial.stop_reason = StopReason.PRUNED
        if progress is not None:
            progress.save_now_and_then()  # after the report, which a resumed trial would not make
        callback.on_trial_step(number, row)
        if interrupt.requested and trial.stop_reason is None:
            if progress is not None:
                progress.save()
            trial.stop_reason = StopReason.INTERRUPTED


class _RowsMissingError(CheckpointError):
    """A checkpoint is whole, and counts rows that are no more."""


class _Progress:
    """What of a trial is on disk: facts and rows, and a checkpoint now and then."""

    def __init__(
        self, trial: Trial, record: TrialRecord, facts: Mapping[str, Any], goes_on: bool
    ) -> None:
        self._trial, self._record, self._goes_on = trial, record, goes_on
        self._writer = TrialWriter(record, {**facts, **trial.constants()})
        self._saved = time.monotonic()

    def begin(self) -> None:
        """Load the checkpoint if there is one, and drop the rows that came after it."""
        try:
            loaded = load_latest(self._record.checkpoint, self._load)
        except _RowsMissingError as error:
            _log.warning("%s; the trial begins again", error)
            self._trial.cleanup()
            self._trial.setup()
            loaded = None
        if loaded is not None:
            _log.info("%s goes on after step %d", self._record.path, self._trial.joint.outer_steps)
        self._writer.begin(self._trial.joint.outer_steps)

    def _load(self, file: Path) -> None:
        """Load a checkpoint, unless rows are missing that it counts.

        Raises:
            CheckpointError: If it is damaged, or they are.
        """
        known = self._trial.load(file)
        step = self._trial.joint.outer_steps
        found = self._record.rows_digest(step)
        if found is None or known not in (None, found):  # earlier versions did not note it
            there = self._record.known_steps()
            what = f"rows up to step {there} of" if there < step else "other rows than"
            raise _RowsMissingError(
                f"{self._record.path / 'steps.csv'} has {what} the {step} that {file.name} counts"
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._writer.append(row)

    def save_now_and_then(self) -> None:
        """Save a checkpoint if the last one is old."""
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        self._record.flush()  # first, so that no checkpoint counts rows that a power cut took
        self._writer.note_rows()
        rows = self._record.rows_digest(self._trial.joint.outer_steps)
        self._trial.save(self._record.checkpoint, generations=True, rows=rows)
        self._saved = time.monotonic()

    def keep(self) -> None:
        """Keep λ and the model of a finished trial, before the record says that it is one.

        Else nobody would do it again, and what the user's code raises here would come too late.
        """
        save_found(self._record.path, self._trial)

    def end(self, reason: StopReason) -> None:
        """Write how it ended; what is over leaves no checkpoint."""
        found = found_at_the_end(self._trial.metrics)
        self._writer.end(reason, found | self._trial.totals())
        if reason not in (StopReason.INTERRUPTED, StopReason.FAILED) and not self._goes_on:
            drop_generations(self._record.checkpoint)
