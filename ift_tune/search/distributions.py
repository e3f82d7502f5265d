"""Distributions of one value: the package's own, and what is made of Optuna's and Ray Tune's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

from ift_tune.base.arguments import plain, require_flag, require_list, shown, take_plain
from ift_tune.base.errors import UsageError
from ift_tune.joint.flat import FlatValue


@dataclass(frozen=True)
class Int:
    """Whole numbers from `low` to `high`, both included; even in the logarithm if `log`.

    With a `step` those that are whole steps above `low`; `high` becomes the last of them.

    Raises:
        UsageError: If `low` is above `high`, or not above 0 where `log` is set, or a logarithmic
            range has steps.

    Example:
        >>> from ift_tune import Int, MetaSpace
        >>> space = MetaSpace({"inner_steps": Int(5, 50, log=True)})
        >>> space.to_optuna()
        {'inner_steps': IntDistribution(high=50, log=True, low=5, step=1)}
        >>> Int(16, 100, step=16).high
        96
    """

    low: int
    high: int
    log: bool = False
    step: int | None = None

    def __post_init__(self) -> None:
        take_plain(self)
        for number in (self.low, self.high, self.step or 1):
            if not isinstance(number, int) or isinstance(number, bool):
                raise UsageError(f"Int goes from one whole number to another, got {shown(number)}")
        if self.step == 1:
            object.__setattr__(self, "step", None)  # the same range
        _check_range(self.low, self.high, self.log, self.step)
        if self.step is not None:
            object.__setattr__(self, "high", self.high - (self.high - self.low) % self.step)

    def at(self, fraction: float) -> int:
        """Return the value this far between the ends."""
        return self.nearest(self.low + fraction * (self.high - self.low))

    def holds(self, value: object) -> bool:
        """Return whether a value is one of the range, to rounding."""
        return _is_near(self, value)

    def nearest(self, value: float) -> int:
        """Return the value of the range that is nearest."""
        step = self.step or 1
        inside = min(max(value, self.low), self.high)
        return self.low + step * round((inside - self.low) / step)

    def values(self) -> list[int]:
        """Return all of them."""
        return list(range(self.low, self.high + 1, self.step or 1))


@dataclass(frozen=True)
class Float:
    """Real numbers from `low` to `high`; even in the logarithm if `log`.

    With a `step` those that are whole steps above `low`; `high` becomes the last of them.

    Raises:
        UsageError: If `low` is above `high`, or not above 0 where `log` is set, or a logarithmic
            range has steps.

    Example:
        >>> from ift_tune import Float, MetaSpace
        >>> space = MetaSpace({"meta_lr": Float(0.001, 0.1, log=True)})
        >>> space.to_optuna()
        {'meta_lr': FloatDistribution(high=0.1, log=True, low=0.001, step=None)}
        >>> Float(0.1, 0.001)
        Traceback (most recent call last):
        ...
        ift_tune.base.errors.UsageError: a range needs low <= high, got 0.1:0.001
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        take_plain(self)
        _check_range(self.low, self.high, self.log, self.step)
        if self.step is not None:
            object.__setattr__(self, "high", self.values()[-1])

    def at(self, fraction: float) -> float:
        """Return the value this far between the ends."""
        value = self.low + fraction * (self.high - self.low)
        return value if self.step is None else self.nearest(value)

    def holds(self, value: object) -> bool:
        """Return whether a value is one of the range, to rounding."""
        return _is_near(self, value)

    def nearest(self, value: float) -> float:
        """Return the value of the range that is nearest."""
        inside = min(max(float(value), self.low), self.high)
        if self.step is None:
            return float(inside)
        return self._above(round((inside - self.low) / self.step))

    def values(self) -> list[float]:
        """Return all of them, where there is a step."""
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        return [self._above(number) for number in range(int((high - low) // step) + 1)]

    def _above(self, steps: int) -> float:
        """Return what is so many steps above the low end, without the rounding of a sum."""
        return float(Decimal(str(self.low)) + steps * Decimal(str(self.step)))


@dataclass(frozen=True)
class Choice:
    """One of a few values.

    Raises:
        UsageError: If there is none.

    Example:
        >>> from ift_tune import Choice, MetaSpace
        >>> space = MetaSpace({"inverse": Choice(("identity", "neumann"))})
        >>> space.to_optuna()
        {'inverse': CategoricalDistribution(choices=('identity', 'neumann'))}
    """

    options: tuple[FlatValue, ...]

    def __post_init__(self) -> None:
        given = require_list("Choice", self.options, "the values to choose from")
        options = [plain(option) for option in given]
        for option in options:
            if not isinstance(option, bool | int | float | str | None):
                raise UsageError(
                    "a choice takes plain values, numbers, truth values and words, got "
                    f"{shown(option)}"
                )
        if not options:
            raise UsageError("a choice needs at least one option")
        if any(option != option for option in options):
            raise UsageError(f"a choice takes values, and NaN is none, got {options!r}")
        object.__setattr__(self, "options", tuple(options))

    def holds(self, value: object) -> bool:
        """Return whether a value is one of them."""
        return value in self.options


def _is_near(d: Int | Float, value: object) -> bool:
    return isinstance(value, int | float) and math.isclose(d.nearest(value), value)


Distribution: TypeAlias = Int | Float | Choice


def as_distribution(name: str, given: Any) -> Distribution:
    """Return a distribution as one of the package's own.

    Optuna's distributions and Ray Tune's domains are known by their classes, so that neither
    library need be installed.

    Args:
        name: What it is of, for the error.
        given: One of the package's own, of Optuna's or of Ray Tune's.

    Raises:
        UsageError: If it is none of these, or one that has no counterpart.

    Example:
        >>> import optuna
        >>> as_distribution("meta_lr", optuna.distributions.FloatDistribution(1e-3, 1.0, log=True))
        Float(low=0.001, high=1.0, log=True, step=None)
    """
    if isinstance(given, Int | Float | Choice):
        return given
    form = "ift_tune.Int(low, high), Float(low, high) or Choice((a, b))"
    if isinstance(given, dict) and given.keys() == {"grid_search"}:
        raise UsageError(
            f"the range of {shown(name)} must be {form}: for Ray's grid_search give a Choice, and "
            f'walk all of it by sampler="grid", got {shown(given)}'
        )
    names = _class_names(given)
    if "optuna.distributions" in names:
        return _from_optuna(given, names["optuna.distributions"])
    if "ray.tune.search.sample" in names:
        return _from_ray(name, given, names["ray.tune.search.sample"])
    raise UsageError(
        f"the range of {shown(name)} must be {form}, or one of Optuna's or Ray Tune's, got "
        f"{shown(given)}"
    )


def _class_names(value: Any) -> dict[str, set[str]]:
    """Return the names of a value's classes by the modules that they are from."""
    found: dict[str, set[str]] = {}
    for kind in type(value).__mro__:
        found.setdefault(kind.__module__, set()).add(kind.__name__)
    return found


def _from_optuna(given: Any, names: set[str]) -> Distribution:
    if "CategoricalDistribution" in names:
        return Choice(tuple(given.choices))
    kind = Int if "IntDistribution" in names else Float
    step = None if given.log else given.step  # Optuna's is 1 on a logarithmic range
    return kind(given.low, given.high, log=given.log, step=step)


def _from_ray(name: str, given: Any, names: set[str]) -> Distribution:
    sampler, step = given.get_sampler(), None
    if "Quantized" in {kind.__name__ for kind in type(sampler).__mro__}:
        sampler, step = sampler.sampler, sampler.q
    drawn = {kind.__name__ for kind in type(sampler).__mro__}
    if "Categorical" in names and "Grid" not in drawn:
        return Choice(tuple(given.categories))
    log = "LogUniform" in drawn
    if log or "Uniform" in drawn:
        low, high = given.lower, given.upper
        if step is not None:  # Ray's are the multiples of it
            low, high = step * math.ceil(low / step - 1e-9), step * math.floor(high / step + 1e-9)
        if "Integer" in names:
            # Ray excludes the upper end, but for multiples of more than 1.
            return Int(low, high - (step in (None, 1)), log=log, step=step)
        if "Float" in names:
            return Float(low, high, log=log, step=step)
    raise UsageError(
        f"the range of {shown(name)} must have two ends, or be a choice: give tune.uniform, "
        f"loguniform, quniform, randint, lograndint, qrandint or choice, got {shown(given)}"
    )


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise UsageError(f"a range needs finite numbers, low <= high, got {shown(end)}")
    require_flag("log", log)
    if not low <= high:
        raise UsageError(f"a range needs low <= high, got {low}:{high}")
    if log and low <= 0:
        raise UsageError(f"a logarithmic range must start above 0, got {low}:{high}")
    if step is None:
        return
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
        raise UsageError(f"the step of a range must be a number above 0, got {shown(step)}")
    if log:
        raise UsageError(
            "a logarithmic range must have no step, for Optuna has none there: leave one of them "
            f"out, or give a Choice of values, got a step of {step}"
        )
