"""Samplers and pruners by name, and a sampler that is made anew for each trial."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.errors import UsageError, nearest
from ift_tune.base.randomness import derive_seed

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


SamplerFactory: TypeAlias = Callable[[int], BaseSampler]


class PerTrialSampler(BaseSampler):
    """Uses a new sampler for each trial, seeded by (seed, trial number).

    What it suggests depends on the seed, the trial's number and the trials before, and not on
    what this process has drawn so far: a resumed study makes the same suggestions as an
    undisturbed one, and two workers never draw the same numbers.
    """

    def __init__(self, make: SamplerFactory, seed: int) -> None:
        """Take what makes a sampler from a seed."""
        self._make, self._seed = make, seed
        self._latest: tuple[int, BaseSampler] | None = None

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if self._latest is None or self._latest[0] != trial.number:
            seed = derive_seed(self._seed, "sampler", trial.number)
            self._latest = (trial.number, self._make(seed))
        return self._latest[1]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Delegate to the trial's sampler."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Delegate to the trial's sampler."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Delegate to the trial's sampler."""
        sampler = self._of(trial)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Delegate to the trial's sampler."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Delegate to the trial's sampler."""
        self._of(trial).after_trial(study, trial, state, values)


def sampler_factory(name: str) -> SamplerFactory:
    """Return what makes the sampler called so from a seed.

    Args:
        name: ``"tpe"``, ``"random"``, ``"gp"`` (Gaussian process) or ``"cmaes"``.

    Raises:
        UsageError: If the name is another.
    """
    if name not in _SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}{nearest(name, _SAMPLERS)}")
    return _SAMPLERS[name]


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """Return the pruner called ``"none"``, ``"median"``, ``"hyperband"`` or ``"asha"``.

    Raises:
        UsageError: If the name is another.
    """
    if name not in _PRUNERS:
        raise UsageError(f"unknown pruner {name!r}{nearest(name, _PRUNERS)}")
    return _PRUNERS[name]()


def _tpe(seed: int) -> BaseSampler:  # not lambdas, for these travel to other processes
    return optuna.samplers.TPESampler(seed=seed)


def _random(seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed)


def _cmaes(seed: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed)


class _Grid(optuna.samplers.GridSampler):
    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Do not stop the study: whoever asks it for trials knows the size of the grid."""


@dataclass(frozen=True)
class GridFactory:
    """Makes the sampler that takes each point of a grid once, in an order of its own.

    Attributes:
        values: By name.
        seed: Of the order, whatever the trial.
    """

    values: Mapping[str, tuple[float, ...]]
    seed: int

    def __call__(self, _seed: int) -> BaseSampler:
        """Make it; see `SamplerFactory`."""
        return _Grid({k: list(v) for k, v in self.values.items()}, seed=self.seed)

    def __len__(self) -> int:
        """Return the number of points."""
        return math.prod(len(v) for v in self.values.values())


def _asha() -> optuna.pruners.BasePruner:
    return RepeatableHalving(first_rung=2, factor=3)


_SAMPLERS: dict[str, SamplerFactory] = {
    "tpe": _tpe,
    "random": _random,
    "gp": _gp,
    "cmaes": _cmaes,
}


_PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "asha": _asha,
}
