"""Optuna's retries: a trial whose process is gone, queued again under another number."""

from __future__ import annotations

import logging

import optuna
from optuna.trial import TrialState

from ift_tune.base.status import StopReason, TrialStatus, ending
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.tables import RunDirectory

RUN_DIRECTORY = "run_directory"
_HISTORY = "retry_history"  # a system attribute of Optuna's retries: the numbers before, in order
_FACTS = "trial.json"
_OPEN = (TrialStatus.RUNNING.value, TrialStatus.INTERRUPTED.value)

_log = logging.getLogger(__name__)


def take_over(run: RunDirectory, trial: optuna.Trial) -> None:
    """Let a retried trial go on where the one before it was: take its folder and its reports.

    The folder moves as a whole, so that its rows, checkpoint and cost are there once. A kill in
    between is mended by the next call.

    Args:
        run: The run directory.
        trial: Not begun yet; one that is no retry is left alone.
    """
    trials = trial.study.get_trials(deepcopy=False)
    history = [trials[number] for number in trials[trial.number].system_attrs.get(_HISTORY, ())]
    if not history:
        return
    record = run.trial(trial.number)
    if not record.facts():
        ours = [t for t in history if t.user_attrs.get(RUN_DIRECTORY) == run.token]
        if not ours:
            _log.warning(
                "trial %d, a retry of trial %d, begins anew: what that had done is not in %s",
                *(trial.number, history[-1].number, run.path),
            )
            return
        sources = (run.trial(dead.number) for dead in reversed(ours))
        source = next((s for s in sources if _holds_steps(s)), None)
        if source is None:  # it had not come to its first step
            return
        source.path.rename(record.path)
        _log.info("trial %d takes over the folder of trial %d", trial.number, source.number)
    before = record.facts()
    if before["trial"] != trial.number:
        run.trial(before["trial"]).describe(before | ending(StopReason.FAILED))
    known = trials[trial.number].intermediate_values
    reports = {step: value for t in history for step, value in t.intermediate_values.items()}
    for step in sorted(reports.keys() - known.keys()):
        trial.report(reports[step], step)


def note_stale(run: RunDirectory, study: optuna.Study) -> None:
    """Say in the tables which trials of a run have failed, as their heartbeat was missed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if trial.user_attrs.get(RUN_DIRECTORY) == run.token:
            record = run.trial(trial.number)
            facts = record.facts()
            if facts.get("status") in _OPEN:
                record.describe(facts | ending(StopReason.FAILED))


def _holds_steps(record: TrialRecord) -> bool:
    """Return whether a trial's folder holds more than its facts: those stay when it is moved."""
    return record.path.is_dir() and any(p.name != _FACTS for p in record.path.iterdir())
