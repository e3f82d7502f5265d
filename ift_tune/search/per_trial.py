"""A sampler that is another one for each trial, and a trial's point, drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GridSampler
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.arguments import shown
from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.search.exhaustion import end_after, exhausted, repeats
from ift_tune.search.space import Space


class PerTrialSampler(BaseSampler):
    """Uses the sampler that is made from the study's seed and the trial's number.

    Where that is a new one for each trial, what it suggests depends on these and on the trials
    before, and not on what this process has drawn so far: a resumed study makes the same
    suggestions as an undisturbed one, and two workers never draw the same numbers.
    """

    def __init__(self, make: Callable[[int, int], BaseSampler], seed: int) -> None:
        """Take what makes a sampler, and the study's seed."""
        self._make, self._seed = make, seed
        self._latest: tuple[int, BaseSampler] | None = None

    def exhausted(self, study: optuna.Study) -> bool:
        """Return whether the next trial would have nothing new, as all points are taken."""
        trials = study.get_trials(deepcopy=False)
        queued = any(trial.state is TrialState.WAITING for trial in trials)
        return not queued and exhausted(self._of(len(trials)), study)

    def repeats(self, study: optuna.Study, number: int) -> bool:
        """Return whether a trial has the point of another one, as none was left."""
        return repeats(self._of(number), study, number)

    def _of(self, number: int) -> BaseSampler:
        if self._latest is None or self._latest[0] != number:
            made = self._make(self._seed, number)
            if not isinstance(made, BaseSampler):
                raise UsageError(
                    f"the sampler function must return an Optuna sampler, got {shown(made)}"
                )
            self._latest = (number, made)
        return self._latest[1]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Delegate to the trial's sampler."""
        return self._of(trial.number).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Delegate to the trial's sampler."""
        return self._of(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Delegate to the trial's sampler."""
        sampler = self._of(trial.number)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Delegate to the trial's sampler."""
        self._of(trial.number).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Delegate to the trial's sampler."""
        sampler = self._of(trial.number)
        if isinstance(sampler, GridSampler):
            end_after(sampler, study, trial, state, values)
        else:
            sampler.after_trial(study, trial, state, values)


def suggest(space: Space | None, trial: optuna.Trial) -> None:
    """Draw the point of a trial; what it has already, it keeps.

    Raises:
        UsageError: If the sampler refuses the space.
        MissingDependencyError: If it needs a library that is not installed.
    """
    try:
        if space is not None:
            space.suggest(trial)
    except UsageError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"the sampler lacks a library: {error}") from error
    except ValueError as error:
        raise UsageError(
            f"the sampler cannot draw from this space: give another one, got {error}"
        ) from error
