"""What a search is after: one metric or several, each with its direction, and constraints."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ift_tune.base.arguments import require_list, shown
from ift_tune.base.constraints import Constraint, finite, refuse_contradictions, refuse_test
from ift_tune.base.direction import Direction, direction_of
from ift_tune.base.errors import UsageError, nearest
from ift_tune.base.status import TrialStatus

if TYPE_CHECKING:
    import pandas as pd

Names: TypeAlias = str | Sequence[str | None] | None
"""A metric or a mode, or one for each objective."""

PARETO, FEASIBLE = "pareto", "feasible"
"""Columns of `trials`: whether a complete trial is on the front, and keeps all constraints."""


@dataclass(frozen=True)
class Objectives:
    """The metrics of a search with their directions, and its constraints.

    The first metric decides within a trial: which evaluation is the best, when to stop and whom to
    prune. The others, and the constraints, are read off a trial's row in the table `trials` at its
    end.

    Attributes:
        metrics: Columns; one None: the error, or the loss.
        directions: In which each is better.
        constraints: What a trial has to keep to be the best.

    Example:
        >>> from ift_tune.base.objectives import Objectives
        >>> aims = Objectives.of(["search_error", "hvps"], None, ["alpha_lambda_max<=2"])
        >>> aims.several, aims.optuna
        (True, ['minimize', 'minimize'])
        >>> aims.values(0.1, {"search_error": 0.1, "hvps": 30.0})
        (0.1, 30.0)
        >>> aims.violations({"alpha_lambda_max": 2.5})
        {'alpha_lambda_max<=2': 0.5}
    """

    metrics: tuple[str | None, ...]
    directions: tuple[Direction, ...]
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def of(cls, metric: Names, mode: Names, constraints: object = ()) -> Objectives:
        """Return what a user's `metric`, `mode` and `constraints` mean.

        Args:
            metric: A column, or several; see `direction_of`.
            mode: ``"min"`` or ``"max"``, one for each metric. Default: as their names say.
            constraints: Texts; see `Constraint.parse`.

        Raises:
            UsageError: If the two differ in length, a metric or a constraint is there twice or is
                of the test split, a direction has to be said, or constraints contradict each other.
        """
        pairs = paired(metric, mode)
        directions = tuple(direction_of(name, way) for name, way in pairs)
        names = tuple(name for name, _ in pairs)
        for name in names[1:]:
            refuse_test(str(name))
        listed = [Constraint.parse(c) for c in require_list("constraints", constraints, "texts")]
        refuse_contradictions(listed)
        return cls(names, directions, tuple(listed))

    @classmethod
    def of_run(cls, run: Any) -> Objectives:
        """Return what `settings` has written down; a run of before had one metric."""
        run = run or {}
        constraints = run.get("constraints") or ()
        if several := run.get("objectives"):
            names, modes = zip(*several, strict=True)
            return cls.of(names, modes, constraints)
        return cls.of(run.get("metric"), Direction.of_run(run).value, constraints)

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides; who reads one metric alone finds the first."""
        plain: dict[str, Any] = {"metric": self.metric, "mode": self.direction.value}
        if self.several:  # in order: so are the values of a study
            pairs = zip(self.metrics, self.directions, strict=True)
            plain["objectives"] = [[name, direction.value] for name, direction in pairs]
        if self.constraints:
            plain["constraints"] = [str(constraint) for constraint in self.constraints]
        return plain

    @property
    def metric(self) -> str | None:
        """The first metric."""
        return self.metrics[0]

    @property
    def direction(self) -> Direction:
        """The first metric's."""
        return self.directions[0]

    @property
    def several(self) -> bool:
        """Whether there are two metrics or more."""
        return len(self.metrics) > 1

    @property
    def names(self) -> list[str] | None:
        """The metrics; None where one is not named, but the first of some that is measured."""
        named = [name for name in self.metrics if name is not None]
        return named or None

    @property
    def optuna(self) -> list[Literal["minimize", "maximize"]]:
        """Optuna's names of the directions."""
        return [direction.optuna for direction in self.directions]

    @property
    def read_at_the_end(self) -> list[str]:
        """The columns beside the first metric that decide."""
        further = [*self.metrics[1:], *(constraint.column for constraint in self.constraints)]
        return list(dict.fromkeys(str(name) for name in further))

    @property
    def words(self) -> str:
        """Each metric with its direction."""
        pairs = zip(self.metrics, self.directions, strict=True)
        return ", ".join(f"{name} ({direction.words})" for name, direction in pairs)

    def check(self, measured: Collection[str]) -> None:
        """Raise a `UsageError` unless trials measure what is read at their end.

        Args:
            measured: Columns with numbers.
        """
        for name in self.read_at_the_end:
            if name not in measured:
                raise UsageError(f"trials do not measure {name!r}{nearest(name, measured)}")

    def values(self, first: float, measured: Mapping[str, Any]) -> tuple[float, ...]:
        """Return a trial's values, one for each metric.

        Args:
            first: That of the first metric.
            measured: What it has measured at its end.

        Raises:
            UsageError: If one is missing.
        """
        found = {name: finite(measured.get(str(name))) for name in self.metrics[1:]}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise UsageError(
                f"every trial must measure what is optimised: name other metrics than "
                f"{', '.join(map(str, missing))}, got a trial that has not measured it"
            )
        return (first, *(value for value in found.values() if value is not None))

    def further_losses(self, measured: Mapping[str, Any]) -> list[float]:
        """Return what trials with the same first value are compared by, less being better."""
        pairs = list(zip(self.metrics, self.directions, strict=True))[1:]
        values = [(finite(measured.get(str(name))), direction) for name, direction in pairs]
        return [math.inf if value is None else way.sign * value for value, way in values]

    def violations(self, measured: Mapping[str, Any], *, complete: bool = True) -> dict[str, float]:
        """Return by how much a trial is beyond each constraint's bound; 0 or less: it is kept.

        What is not measured cannot be shown to hold: it counts as violated.

        Args:
            measured: What the trial has measured at its end.
            complete: Whether it came to it. Of one that did not, what is not known is left out.
        """
        found = {c: c.violation(measured) for c in self.constraints}
        if not complete:
            return {str(c): value for c, value in found.items() if value is not None}
        return {str(c): c.unknown if value is None else value for c, value in found.items()}

    def mark(self, trials: pd.DataFrame) -> None:
        """Add the columns `FEASIBLE`, where there are constraints, and `PARETO`, where it says.

        Args:
            trials: A table; complete trials that keep all constraints can be on its front.
        """
        if not (self.several or self.constraints) or trials.empty:
            return
        able = (trials["status"] == TrialStatus.COMPLETE.value).to_numpy(dtype=bool)
        for constraint in self.constraints:
            able = able & (constraint.excess(_column(trials, constraint.column)) <= 0.0)
        if self.constraints:
            trials[FEASIBLE] = able
        if self.several:
            columns = zip(self.metrics, self.directions, strict=True)
            losses = np.stack([d.sign * _column(trials, str(name)) for name, d in columns], axis=1)
            able = able & np.isfinite(losses).all(axis=1)
            front = np.zeros_like(able)
            front[able] = undominated(losses[able])
            trials[PARETO] = front


def paired(metric: Names, mode: Names) -> list[tuple[Any, Any]]:
    """Return each metric with its mode, None where none is said.

    Raises:
        UsageError: If there is no metric, one twice, or not one mode for each.
    """
    if metric is None or isinstance(metric, str) or not isinstance(metric, Sequence):
        metrics: list[Any] = [metric]
    else:
        metrics = list(metric)
        if not metrics or not all(isinstance(name, str) and name for name in metrics):
            raise UsageError(
                "metric must be a name or a list of names such as "
                f"['search_error', 'gradient_equivalents'], got {shown(metric)}"
            )
    if len(set(map(str, metrics))) < len(metrics):
        raise UsageError(f"each metric can be optimised once, got {shown(metric)}")
    if mode is None:
        return [(name, None) for name in metrics]
    modes = [mode] if isinstance(mode, str) or not isinstance(mode, Sequence) else list(mode)
    if len(modes) != len(metrics):
        raise UsageError(
            f"each metric needs its mode, 'min' or 'max': give {len(metrics)} in the order of the "
            f"metrics, or none, got {len(modes)} for {', '.join(map(str, metrics))}"
        )
    return list(zip(metrics, modes, strict=True))


def undominated(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other one is as good as everywhere and better somewhere.

    Args:
        losses: A row a point, to be minimised, all finite.
    """
    front = np.ones(len(losses), dtype=bool)
    for index, point in enumerate(losses):
        dominating = (losses <= point).all(axis=1) & (losses < point).any(axis=1)
        front[index] = not dominating.any()
    return front


def _column(table: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Return a column's numbers; NaN where there are none, which keeps no bound."""
    if name not in table:
        return np.full(len(table), np.nan)
    found: NDArray[np.float64] = table[name].to_numpy(dtype=float, na_value=np.nan)
    return np.where(np.isfinite(found), found, np.nan)
