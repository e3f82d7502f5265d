"""Ranges that a search draws from: for Optuna and for Ray Tune alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ift_tune.config import Flat, FlatValue, MetaConfig
from ift_tune.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Int:
    """Whole numbers from `low` to `high`, both included; even in the logarithm if `log`."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)

    def at(self, fraction: float) -> int:
        """Return the value this far between the ends."""
        return round(self.low + fraction * (self.high - self.low))


@dataclass(frozen=True)
class Float:
    """Real numbers from `low` to `high`; even in the logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)

    def at(self, fraction: float) -> float:
        """Return the value this far between the ends."""
        return self.low + fraction * (self.high - self.low)


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    options: tuple[FlatValue, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise UsageError("a choice needs at least one option")


Distribution: TypeAlias = Int | Float | Choice


@dataclass(frozen=True)
class Space:
    """Distributions by name.

    Attributes:
        distributions: By name.

    Raises:
        UsageError: If there is none.
    """

    distributions: Mapping[str, Distribution]

    def __post_init__(self) -> None:
        if not self.distributions:
            raise UsageError("the space is empty: there is nothing to search")

    def suggest(self, trial: optuna.trial.BaseTrial) -> Flat:
        """Return one point, drawn by an Optuna trial."""
        point: Flat = {}
        for key in self._order():
            if not self._applies(key, point):
                continue
            d = self.distributions[key]
            if isinstance(d, Int):
                point[key] = trial.suggest_int(key, d.low, d.high, log=d.log)
            elif isinstance(d, Float):
                point[key] = trial.suggest_float(key, d.low, d.high, log=d.log)
            else:
                point[key] = trial.suggest_categorical(key, d.options)
        return point

    def clipped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return `values` with those of ranges moved to the nearest end where they are outside.

        Population based training multiplies values without looking at the ranges.
        """
        return {**values} | {
            key: type(d.low)(min(max(values[key], d.low), d.high))
            for key, d in self.distributions.items()
            if key in values and not isinstance(d, Choice)
        }

    def check(self, config: MetaConfig) -> None:
        """Raise the `UsageError` that some point would give, before any trial runs."""

    def applicable(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that mean something beside each other."""
        return dict(values)

    def _order(self) -> list[str]:
        """Return the names in the order in which they are drawn."""
        return list(self.distributions)

    def _applies(self, key: str, point: Mapping[str, Any]) -> bool:
        """Return whether `key` means anything beside what is drawn already."""
        return True

    def to_optuna(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Return the space for ``study.ask(fixed_distributions)``."""
        from optuna import distributions as optuna_distributions

        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for key, d in self.distributions.items():
            if isinstance(d, Int):
                found[key] = optuna_distributions.IntDistribution(d.low, d.high, log=d.log)
            elif isinstance(d, Float):
                found[key] = optuna_distributions.FloatDistribution(d.low, d.high, log=d.log)
            else:
                found[key] = optuna_distributions.CategoricalDistribution(d.options)
        return found

    def to_ray(self) -> dict[str, Any]:
        """Return the space as a Ray Tune ``param_space``.

        Raises:
            MissingDependencyError: If Ray Tune is not installed.
        """
        try:
            from ray import tune
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "to_ray needs Ray Tune: pip install 'ift_tune[ray]'"
            ) from error
        found: dict[str, Any] = {}
        for key, d in self.distributions.items():
            if isinstance(d, Int):  # Ray's upper ends are excluded
                found[key] = (tune.lograndint if d.log else tune.randint)(d.low, d.high + 1)
            elif isinstance(d, Float):
                found[key] = (tune.loguniform if d.log else tune.uniform)(d.low, d.high)
            else:
                found[key] = tune.choice(list(d.options))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values that tell one space from another."""
        return {
            key: {"kind": type(d).__name__, **asdict(d)} for key, d in self.distributions.items()
        }


def _check_range(low: float, high: float, log: bool) -> None:
    if not low <= high:
        raise UsageError(f"a range needs low <= high, got {low}:{high}")
    if log and low <= 0:
        raise UsageError(f"a logarithmic range must start above 0, got {low}:{high}")
