"""Successive halving that says the same when it is asked twice."""

from __future__ import annotations

import copy
from typing import Any, cast

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import FrozenTrial

_RUNG = "completed_rung_"  # under which Optuna notes on a trial what it had at each rung


class RepeatableHalving(SuccessiveHalvingPruner):
    """Optuna's asynchronous successive halving, for trials that may be resumed.

    Optuna notes that a trial has passed a rung before it says whether to prune there, and a process
    may be killed in between. Resumed, the trial would be taken to be past a rung that it was about
    to be stopped at. So a note of the step that is judged does not count: the rung is judged again,
    against the same others.

    Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    def __init__(self, first_rung: int, factor: int) -> None:
        """Take where the rungs are.

        Args:
            first_rung: Step of the first; each further one is `factor` times as far.
            factor: One in so many is promoted.
        """
        super().__init__(min_resource=first_rung, reduction_factor=factor)
        self._first, self._factor = first_rung, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its latest step."""
        steps = sorted(trial.intermediate_values)
        if not steps:
            return False
        before = steps[-2] if len(steps) > 1 else 0
        judged = copy.copy(trial)
        judged.system_attrs = {
            key: value
            for key, value in trial.system_attrs.items()
            if not key.startswith(_RUNG) or self._step_of(key) <= before
        }
        return super().prune(cast(optuna.Study, _Others(study, trial.number)), judged)

    def _step_of(self, key: str) -> int:
        factor: int = self._factor ** int(key.removeprefix(_RUNG))
        return self._first * factor


class _Others:
    """A study without the trial that is judged, whose own notes would compete with it."""

    def __init__(self, study: optuna.Study, number: int) -> None:
        self._study, self._number = study, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, **options: Any) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(**options) if t.number != self._number]
