"""Pruners: by name and as objects, in forms that decide the same in a study that was resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, PatientPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, nearest

_RUNG = "completed_rung_"  # under which Optuna notes on a trial what it had at each rung
_AUTO = "auto"


class RepeatableHalving(SuccessiveHalvingPruner):
    """Optuna's asynchronous successive halving, for trials that may be resumed.

    Optuna notes that a trial has passed a rung before it says whether to prune there, and a process
    may be killed in between. Resumed, the trial would be taken to be past a rung that it was about
    to be stopped at. So a note of the step that is judged does not count: the rung is judged again,
    against the same others.

    Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    def __init__(
        self,
        first_rung: int | None,
        factor: int,
        *,
        early: int = 0,
        bootstrap: int = 0,
        longest: int | None = None,
    ) -> None:
        """Take where the rungs are.

        Args:
            first_rung: Step of the first; each further one is `factor` times as far. None: a
                hundredth of the longest trial.
            factor: One in so many is promoted.
            early: How many of the first rungs there are not.
            bootstrap: How many trials a rung needs before it promotes one.
            longest: Steps of the longest trial; None: of the one that is complete first.
        """
        super().__init__(
            min_resource=_AUTO if first_rung is None else first_rung,
            reduction_factor=factor,
            min_early_stopping_rate=early,
            bootstrap_count=bootstrap,
        )
        self._longest = longest

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its latest step."""
        steps = sorted(trial.intermediate_values)
        if self._min_resource is None:
            longest = self._longest or _length_of_first(study)
            self._min_resource = None if longest is None else max(longest // 100, 1)
        if not steps or self._min_resource is None:
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
        rung = self._min_early_stopping_rate + int(key.removeprefix(_RUNG))
        factor: int = self._reduction_factor**rung
        return (self._min_resource or 1) * factor


class _Others:
    """A study without the trial that is judged, whose own notes would compete with it."""

    def __init__(self, study: optuna.Study, number: int) -> None:
        self._study, self._number = study, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, **options: Any) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(**options) if t.number != self._number]


class RepeatableHyperband(HyperbandPruner):
    """Optuna's Hyperband, for studies that may be resumed and that several processes work on.

    Optuna divides trials into brackets by the longest trial that is complete when a process first
    asks, and samplers see one bracket only after that. A process that goes on with the study, or
    works on it too, would have other brackets. Here they follow from what all processes know, as
    soon as it is known.

    Li et al., Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization, JMLR 2018.
    """

    def __init__(
        self,
        first_rung: int,
        longest: int | None,
        factor: int,
        *,
        bootstrap: int = 0,
    ) -> None:
        """Take what decides on the brackets.

        Args:
            first_rung: Step of the first rung of the first bracket.
            longest: Steps of the longest trial; None: of the one that is complete first, before
                which none is pruned.
            factor: One in so many is promoted.
            bootstrap: How many trials a rung needs before it promotes one.
        """
        super().__init__(first_rung, _AUTO if longest is None else longest, factor, bootstrap)

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if not self._pruners:
            self._try_initialization(study)
        return super()._get_bracket_id(study, trial)

    def _try_initialization(self, study: optuna.Study) -> None:
        if self._max_resource == _AUTO:
            longest = _length_of_first(study)
            if longest is None:
                return
            self._max_resource = longest
        super()._try_initialization(study)
        self._pruners = [
            RepeatableHalving(
                self._min_resource,
                self._reduction_factor,
                early=bracket,
                bootstrap=self._bootstrap_count,
            )
            for bracket in range(len(self._pruners))
        ]


def _length_of_first(study: optuna.Study) -> int | None:
    """Return the steps of the trial that was complete first, whatever came after it."""
    # Not study.get_trials: of the study that Hyperband makes of a bracket, it asks for brackets.
    trials = study._storage.get_all_trials(
        study._study_id, deepcopy=False, states=(TrialState.COMPLETE,)
    )
    ended = [
        (trial.datetime_complete, trial.number, trial.last_step)
        for trial in trials
        if trial.datetime_complete is not None and trial.last_step is not None
    ]
    return min(ended)[2] if ended else None


def repeatable(pruner: BasePruner, longest: int | None = None) -> BasePruner:
    """Return what decides as a pruner of Optuna's does, in a study that was resumed too.

    An object of a class of the user's own is returned as it is.

    Args:
        pruner: It; it stays as it is.
        longest: Steps of the longest trial, which is what its ``"auto"`` means; None: those of the
            trial that is complete first.
    """
    if type(pruner) is PatientPruner and pruner._wrapped_pruner is not None:
        patient = copy.copy(pruner)
        patient._wrapped_pruner = repeatable(pruner._wrapped_pruner, longest)
        return patient
    if type(pruner) is SuccessiveHalvingPruner:
        return RepeatableHalving(
            pruner._min_resource,
            pruner._reduction_factor,
            early=pruner._min_early_stopping_rate,
            bootstrap=pruner._bootstrap_count,
            longest=longest,
        )
    if type(pruner) is HyperbandPruner:
        most = pruner._max_resource
        return RepeatableHyperband(
            pruner._min_resource,
            most if isinstance(most, int) else longest,
            pruner._reduction_factor,
            bootstrap=pruner._bootstrap_count,
        )
    return pruner


def make_pruner(name: str) -> BasePruner:
    """Return the pruner called ``"none"``, ``"median"``, ``"hyperband"`` or ``"asha"``.

    Raises:
        UsageError: If the name is another.
    """
    if name not in PRUNERS:
        raise UsageError(f"unknown pruner {name!r}{nearest(name, PRUNERS)}")
    return PRUNERS[name]()


def as_pruner(pruner: str | BasePruner | None) -> BasePruner:
    """Return a pruner, given it or its name; None prunes nothing.

    Raises:
        UsageError: If it is neither.
    """
    if isinstance(pruner, str):
        return make_pruner(pruner)
    if pruner is not None and not isinstance(pruner, BasePruner):
        raise UsageError(
            f"pruner must be a name ({', '.join(PRUNERS)}) or an Optuna pruner such as "
            f"optuna.pruners.MedianPruner(), got {shown(pruner)}"
        )
    return optuna.pruners.NopPruner() if pruner is None else pruner


def _asha() -> BasePruner:
    return RepeatableHalving(first_rung=2, factor=3)


PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "hyperband": HyperbandPruner,
    "asha": _asha,
}
"""What makes them, by name."""
