"""Samplers that come to an end: when no further point is left to suggest.

Optuna's `GridSampler` and `BruteForceSampler` end their study themselves, after a trial, in the
process that ran it. Other processes, and a resumed study, have to find out before they begin one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler
from optuna.trial import FrozenTrial, TrialState


def exhausted(sampler: BaseSampler, study: optuna.Study) -> bool:
    """Return whether a sampler has nothing left to suggest; False for one that has no end."""
    if isinstance(sampler, GridSampler):
        return sampler.is_exhausted(study)
    if isinstance(sampler, BruteForceSampler):
        finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        # One that failed before it had a point says nothing, and Optuna takes it for the last.
        latest = max((t for t in finished if t.params), key=lambda t: t.number, default=None)
        return latest is not None and _would_stop(sampler, study, latest)
    return False


def repeats(sampler: BaseSampler, study: optuna.Study, number: int) -> bool:
    """Return whether a trial has a point that another one has or had, as all are taken.

    Args:
        sampler: Its sampler.
        study: The study.
        number: The trial's.
    """
    if not isinstance(sampler, GridSampler | BruteForceSampler):
        return False
    trials = study.get_trials(deepcopy=False)
    mine = trials[number]
    if "fixed_params" in mine.system_attrs:  # the user has asked for it
        return False
    others = (t for t in trials if t.number != number and t.state is not TrialState.WAITING)
    return any(_point(other) == _point(mine) for other in others)


def end_after(
    sampler: GridSampler,
    study: optuna.Study,
    trial: FrozenTrial,
    state: TrialState,
    values: Sequence[float] | None,
) -> None:
    """Let a grid end its study, after a trial that may have come from the queue.

    Optuna's own looks for the trial's place in the grid, which one from the queue has not.
    """
    if "grid_id" in trial.system_attrs:
        sampler.after_trial(study, trial, state, values)
    elif sampler.is_exhausted(study):
        study.stop()


def _point(trial: FrozenTrial) -> Any:
    """Return what tells one point from another: in a grid, keys that do not apply count too."""
    attributes = trial.system_attrs
    if "grid_id" in attributes:
        return attributes["search_space"], attributes["grid_id"]
    return trial.params


class _Asked:
    """A study that notes whether somebody would stop it."""

    def __init__(self, study: optuna.Study) -> None:
        self._study, self.stopped = study, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def stop(self) -> None:
        self.stopped = True


def _would_stop(sampler: BaseSampler, study: optuna.Study, latest: FrozenTrial) -> bool:
    asked = _Asked(study)
    values = latest.values if latest.state is TrialState.COMPLETE else None
    sampler.after_trial(cast(optuna.Study, asked), latest, latest.state, values)
    return asked.stopped
