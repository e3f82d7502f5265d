"""Bounds on what a trial measures, which the best one has to keep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError

_FORM = re.compile(r"\s*([^\s<>=](?:[^<>=]*[^\s<>=])?)\s*(<=|>=)\s*(\S+)\s*")
_OF_THE_TEST_SPLIT = re.compile(r"((retrained|baseline)_)?test_.*|val_test_gap")


@dataclass(frozen=True)
class Constraint:
    """A bound on a column of a trial, which has to hold at its end.

    Attributes:
        column: Of the table `trials`.
        relation: ``"<="`` or ``">="``.
        bound: A number.
    """

    column: str
    relation: str
    bound: float

    @classmethod
    def parse(cls, text: object) -> Constraint:
        """Return the constraint that a text such as ``"alpha_lambda_max<=2"`` states.

        Raises:
            UsageError: If it states none, or one of the test split.
        """
        found = _FORM.fullmatch(text) if isinstance(text, str) else None
        if found is None or (bound := _bound(found[3])) is None:
            raise UsageError(
                "a constraint must be COLUMN<=NUMBER or COLUMN>=NUMBER, such as "
                f"'alpha_lambda_max<=2', got {shown(text)}"
            )
        refuse_test(found[1])
        return cls(found[1], found[2], bound)

    def __str__(self) -> str:
        return f"{self.column}{self.relation}{repr(self.bound).removesuffix('.0')}"

    def excess(self, values: Any) -> Any:
        """Return by how much values, or an array of them, are beyond the bound; 0 or less: kept."""
        return values - self.bound if self.relation == "<=" else self.bound - values

    def violation(self, measured: Mapping[str, Any]) -> float | None:
        """Return the excess of what a trial has measured; None where there is no finite number."""
        value = finite(measured.get(self.column))
        return None if value is None else float(self.excess(value))

    @property
    def unknown(self) -> float:
        """The violation of a trial that cannot show that it keeps the bound."""
        return max(1.0, abs(self.bound))


def _bound(text: str) -> float | None:
    try:
        return finite(float(text))
    except ValueError:
        return None


def finite(value: object) -> float | None:
    """Return a value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return float(value)


def refuse_test(name: str) -> None:
    """Raise a `UsageError` if a column is of the test split."""
    if _OF_THE_TEST_SPLIT.fullmatch(name):
        raise UsageError(
            "the test split is only reported, as what it chooses it can no longer judge: take the "
            f"search split's columns, such as search_error, got {name}"
        )


def refuse_contradictions(constraints: Sequence[Constraint]) -> None:
    """Raise a `UsageError` if a bound is given twice, or no number keeps two of them."""
    bounds: dict[tuple[str, str], Constraint] = {}
    for constraint in constraints:
        if (key := (constraint.column, constraint.relation)) in bounds:
            raise UsageError(
                f"{constraint.column} can have one bound with {constraint.relation}, got "
                f"{bounds[key]} and {constraint}"
            )
        bounds[key] = constraint
    for (column, relation), upper in bounds.items():
        lower = bounds.get((column, ">="))
        if relation == "<=" and lower is not None and lower.bound > upper.bound:
            raise UsageError(f"no trial can keep both bounds: drop one, got {lower} and {upper}")
