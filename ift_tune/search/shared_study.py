"""A study whose trials several processes claim, and which one of them may stop for all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState, create_trial

from ift_tune.search.per_trial import PerTrialSampler

_STOPPED = "stopped"


class SharedStudy(optuna.Study):
    """A study in whose `optimize` trials are claimed, beside other processes on the same storage.

    Optuna's own `stop` ends the loop of one process and is an error outside of it. Trials of a
    call of `run_study` run in several processes, and its callbacks are called in yet another one:
    so the wish to stop is kept in the storage, for the session of that call alone.

    Attributes:
        claim: Returns the trial to run next; None where `ask` is Optuna's own.
        sampler: Knows when it has come to its end.
        session: Whose loops `stop` ends; None where it is Optuna's own.
    """

    sampler: PerTrialSampler
    claim: Callable[[], optuna.Trial] | None = None
    session: str | None = None

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> optuna.Trial:
        """Return the trial to run next, which may be one that another process has left."""
        return super().ask(fixed_distributions) if self.claim is None else self.claim()

    def new_trial(self, marks: Mapping[str, Any]) -> optuna.Trial:
        """Return the trial that waits in the queue, or a new one.

        Args:
            marks: User attributes that tell whose trial it is. A new one is made with them in one
                go: one that a kill left without would be nobody's, and count for ever as running.
        """
        if not self.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.add_trial(create_trial(state=TrialState.WAITING, user_attrs=dict(marks)))
        trial = super().ask()
        for name, value in marks.items():  # it may have waited for another
            if trial.user_attrs.get(name) != value:
                trial.set_user_attr(name, value)
        return trial

    def stop(self) -> None:
        """Let no further trial of the session begin; those at work come to their end."""
        if self.session is None:
            super().stop()
        else:
            self.set_user_attr(_STOPPED, self.session)

    @property
    def stopped(self) -> bool:
        """Whether the session was stopped, by whichever process."""
        return self.session is not None and self.user_attrs.get(_STOPPED) == self.session

    @property
    def has_heartbeat(self) -> bool:
        """Whether Optuna looks in the storage for trials whose process is gone."""
        interval = getattr(self._storage, "get_heartbeat_interval", None)
        return interval is not None and interval() is not None

    def keep_alive(self, trials: Sequence[FrozenTrial]) -> None:
        """Let Optuna not fail trials whose process is gone: they are about to be taken up.

        Where the storage has them retried, it shall.
        """
        storage: Any = self._storage
        names = ("get_heartbeat_stale_trial_callback", "get_failed_trial_callback")  # new and old
        retry = next((getattr(storage, name) for name in names if hasattr(storage, name)), None)
        if self.has_heartbeat and retry is not None and retry() is None:
            for trial in trials:
                storage.record_heartbeat(trial._trial_id)

    def left(self) -> None:
        """Be an ordinary study again: its loops have ended."""
        self.claim = self.session = None


def name_metrics(study: optuna.Study, metric: str | Sequence[str] | None) -> None:
    """Name what a study optimises, for dashboards and `trials_dataframe`, unless it has names.

    Args:
        study: The study.
        metric: What its trials have measured, or several such; None where they have not.
    """
    if metric is None or study.metric_names is not None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([metric] if isinstance(metric, str) else list(metric))
