"""Samplers that walk along a sequence: which point a trial has depends on its number alone."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import optuna
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from ift_tune.base.randomness import derive_seed


class PointSampler(BaseSampler, abc.ABC):
    """Trial k has the k-th of a sequence of points, whoever draws it and however often."""

    @abc.abstractmethod
    def value(self, number: int, dimension: int, name: str, distribution: BaseDistribution) -> Any:
        """Return a coordinate of a point.

        Args:
            number: Which point: the trial's number.
            dimension: How many parameters of the trial have been drawn before this one.
            name: The parameter's name.
            distribution: Where its value comes from.
        """

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return nothing: parameters are drawn one by one."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the coordinate of the trial's point."""
        return self.value(trial.number, len(trial.params), param_name, param_distribution)


class SobolSampler(PointSampler):
    """A Sobol' sequence, whose points fill the space more evenly than random ones do.

    Sobol', USSR Comput. Math. Math. Phys. 7(4), 1967; directions of Joe and Kuo, 2008. It is
    scrambled by a digital shift, one for each dimension, under which it stays a (t, s)-sequence.
    Optuna's own counts in the study, which a resumed trial would do twice, and draws the first
    trials at random, as long as none has told it the space.
    """

    def __init__(self, seed: int) -> None:
        """Take the seed of the shift: with the same one for all trials, they form one sequence."""
        self._seed = seed

    def value(self, number: int, dimension: int, name: str, distribution: BaseDistribution) -> Any:
        """Return a coordinate of the Sobol' point, in the range of the distribution."""
        engine: Any = torch.quasirandom.SobolEngine(dimension + 1)  # type: ignore[no-untyped-call]
        if number:
            engine.fast_forward(number)
        bits = 2**engine.MAXBIT
        digits = int(engine.draw(1, dtype=torch.float64)[0, dimension].item() * bits)
        shift = derive_seed(self._seed, "sobol", dimension) % bits
        return _from_unit((digits ^ shift) / bits, distribution)


class GridSampler(PointSampler):
    """Takes each point of a grid once, in random order.

    In the order of Optuna's own, which ends its study itself, where whoever asks for trials knows
    the size of the grid.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]], seed: int) -> None:
        """Take the grid.

        Args:
            values: By name.
            seed: Of the order.
        """
        self._names = sorted(values)
        self._points = list(itertools.product(*(values[name] for name in self._names)))
        np.random.RandomState(seed).shuffle(self._points)

    def value(self, number: int, dimension: int, name: str, distribution: BaseDistribution) -> Any:
        """Return the point's value; after the last point, it begins again."""
        return self._points[number % len(self._points)][self._names.index(name)]


def _from_unit(share: float, distribution: BaseDistribution) -> Any:
    """Return the value that lies this far along a distribution, from 0 to below 1."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    numbers = cast("FloatDistribution | IntDistribution", distribution)
    low, high, step = numbers.low, numbers.high, numbers.step
    # A whole number stands for the values around it, so that the ends are as likely as the others.
    half = 0.5 * step if step is not None else 0.0
    start, stop = low - half, high + half
    if numbers.log:
        found = math.exp(math.log(start) + share * (math.log(stop) - math.log(start)))
    else:
        found = start + share * (stop - start)
    if step is not None:
        found = low + step * round((found - low) / step)
    found = min(max(found, low), high)
    return int(found) if isinstance(distribution, IntDistribution) else found
