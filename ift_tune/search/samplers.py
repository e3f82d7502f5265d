"""Samplers: by name, as objects, and as functions that make them."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, nearest
from ift_tune.base.randomness import derive_seed
from ift_tune.search.distributions import Choice, Float
from ift_tune.search.sampler_objects import from_object
from ift_tune.search.sequences import GridSampler, SobolSampler
from ift_tune.search.space import Space

SamplerFactory: TypeAlias = Callable[[int, int], BaseSampler]
"""``factory(seed, trial_number)`` makes the sampler of one trial; an importable function.

The seed is the study's, the same for all trials. A sampler of random numbers needs another one for
each trial, see `trial_seed`; one that walks along a sequence needs the same one.
"""


def trial_seed(seed: int, trial_number: int) -> int:
    """Return a seed for the random numbers of one trial's sampler."""
    return derive_seed(seed, "sampler", trial_number)


@dataclass(frozen=True)
class _OfOneArgument:
    """A factory of before trials had numbers: it takes a seed that differs from trial to trial."""

    make: Callable[[int], BaseSampler]

    def __call__(self, seed: int, trial_number: int) -> BaseSampler:
        return self.make(trial_seed(seed, trial_number))


def as_sampler_factory(
    sampler: str | BaseSampler | Callable[..., BaseSampler] | None, space: Space | None = None
) -> SamplerFactory:
    """Return what makes samplers, TPE by default; one that takes a seed alone is still accepted.

    A sampler object of Optuna's own classes is copied for each trial, one of another class is
    used as it is; both are seeded for the trial from their own seed, the study's and the number.

    Args:
        sampler: A name of `sampler_factory`, a sampler, or a function.
        space: What varies; a grid needs it.

    Raises:
        UsageError: If it is neither, or a function of neither ``(seed, trial_number)`` nor
            ``(seed)``.
    """
    if sampler is None:
        return _tpe
    if isinstance(sampler, str):
        return sampler_factory(sampler, space)
    if isinstance(sampler, BaseSampler):
        return from_object(sampler)
    if not callable(sampler) or _is_class_without_seed(sampler):
        raise UsageError(
            f"sampler must be a name ({', '.join(SAMPLERS)}), a sampler of Optuna's such as "
            "optuna.samplers.TPESampler(), or a function (seed, trial_number) that makes one for "
            f"each trial, got {shown(sampler)}"
        )
    return _with_two_arguments(sampler)


def _is_class_without_seed(make: Callable[..., BaseSampler]) -> bool:
    """Return whether it is a class of samplers whose first argument is something else."""
    if not isinstance(make, type) or not issubclass(make, BaseSampler):
        return False
    return next(iter(inspect.signature(make).parameters), None) != "seed"


def _with_two_arguments(make: Callable[..., BaseSampler]) -> SamplerFactory:
    for arguments in ((0,), (0, 0)):
        try:
            inspect.signature(make).bind(*arguments)
        except (TypeError, ValueError):  # the latter where there is no signature
            continue
        if len(arguments) == 2:
            return make
        warnings.warn(
            "a sampler factory is now called with (seed, trial_number), where the seed is the same "
            "for all trials; one that takes a seed alone gets another one for each trial",
            DeprecationWarning,
            stacklevel=4,
        )
        return _OfOneArgument(make)
    raise UsageError(f"sampler must be a function (seed, trial_number), got {shown(make)}")


def grid_factory(values: Mapping[str, Sequence[Any]]) -> SamplerFactory:
    """Return what makes the sampler of a grid, given its values by name."""
    return functools.partial(_grid, values)


def sampler_factory(name: str, space: Space | None = None) -> SamplerFactory:
    """Return what makes the samplers called so.

    Args:
        name: ``"tpe"``, ``"random"``, ``"gp"`` (Gaussian process), ``"cmaes"``, ``"qmc"``
            (quasi-Monte Carlo: a Sobol' sequence), ``"nsgaii"``, ``"nsgaiii"`` (genetic),
            ``"grid"`` or ``"bruteforce"``; these two end the study when each point was there.
        space: What varies; a grid needs it.

    Raises:
        UsageError: If the name is another, or there is no end to the points of a grid.
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}{nearest(name, SAMPLERS)}")
    if name == _GRID:
        return functools.partial(_grid_of_optuna, _points(space))
    return _FACTORIES[name]


def _points(space: Space | None) -> dict[str, list[Any]]:
    """Return the values of each key of a space of finitely many points."""
    if space is None:
        raise UsageError("a grid needs the space whose points it goes through: give a space")
    found: dict[str, list[Any]] = {}
    for key, d in space.distributions.items():
        if isinstance(d, Float) and d.step is None:
            raise UsageError(
                f"a grid needs finitely many values: give {key} as Choice((a, b, c)) "
                f"(--vary {key}=A,B,C) or with a step, got {d}"
            )
        found[key] = list(d.options if isinstance(d, Choice) else d.values())
    return found


def _tpe(seed: int, trial_number: int) -> BaseSampler:  # not lambdas, for these travel
    return optuna.samplers.TPESampler(seed=trial_seed(seed, trial_number))


def _random(seed: int, trial_number: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=trial_seed(seed, trial_number))


def _gp(seed: int, trial_number: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=trial_seed(seed, trial_number))


def _cmaes(seed: int, trial_number: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=trial_seed(seed, trial_number))


def _qmc(seed: int, trial_number: int) -> BaseSampler:
    return SobolSampler(seed)


def _nsgaii(seed: int, trial_number: int) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=trial_seed(seed, trial_number))


def _nsgaiii(seed: int, trial_number: int) -> BaseSampler:
    return optuna.samplers.NSGAIIISampler(seed=trial_seed(seed, trial_number))


def _bruteforce(seed: int, trial_number: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # at each trial
        return optuna.samplers.BruteForceSampler(seed=trial_seed(seed, trial_number))


def _grid_of_optuna(
    values: Mapping[str, Sequence[Any]], seed: int, trial_number: int
) -> BaseSampler:
    return optuna.samplers.GridSampler(values, seed=seed)  # one order for all trials


def _grid(values: Mapping[str, Sequence[Any]], seed: int, trial_number: int) -> BaseSampler:
    return GridSampler(values, seed)


_GRID = "grid"
_FACTORIES: dict[str, SamplerFactory] = {
    "tpe": _tpe,
    "random": _random,
    "gp": _gp,
    "cmaes": _cmaes,
    "qmc": _qmc,
    "nsgaii": _nsgaii,
    "nsgaiii": _nsgaiii,
    "bruteforce": _bruteforce,
}
SAMPLERS = (*_FACTORIES, _GRID)
"""Their names."""
