"""What drives a trial to its end: its callbacks, its record, its pruner, an interrupt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ift_tune.base.checkpoints import drop_generations, load_latest
from ift_tune.base.errors import CheckpointError, EnvironmentFaultError
from ift_tune.base.faults import surroundings
from ift_tune.base.interrupt import Interrupt as Interrupt  # this was its home once
from ift_tune.base.status import Outcome, StopReason, found_at_the_end
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.trial.plan import TrialPlan as TrialPlan  # likewise: Ray's snapshots name it
from ift_tune.trial.record import TrialRecord, TrialWriter, save_found
from ift_tune.trial.trial import OUT_OF_MEMORY, Half, Trial, finished

CHECKPOINT_SECONDS = 20.0  # what a kill can cost of a trial

_log = logging.getLogger(__name__)


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
                # In the middle of a step that had no room there is no state to go on from.
                if progress is not None and goes_on and trial.stop_reason is not StopReason.OOM:
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
    found = trial.metrics | trial.totals()
    outcome = Outcome(reason, trial.value, trial.metric, found, trial.direction.value)
    _log.info("trial %d ended: %s", number, outcome.ending)
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
        if (row := self._trial.taken_back) is not None:
            self._writer.append(row)
            self.save()  # which counts this row, and not the one that was there

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
