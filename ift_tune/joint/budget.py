"""How long a trial runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ift_tune.base.arguments import known_keywords, require_flag, take_plain
from ift_tune.base.errors import UsageError, require_integer, require_number

_LATER = "patience"
_LIMITS = ("outer_steps", "gradient_equivalents", "seconds", "patience")


@known_keywords()
@dataclass(frozen=True)
class Budget:
    """How long a trial runs, and what it measures on the way. The first limit reached ends it.

    Attributes:
        outer_steps: Most outer steps.
        gradient_equivalents: Most cost, counted: forward and backward of one training mini-batch
            is 1, a forward alone 1/3, a Hessian-vector product 2; see `Cost`. An outer step that
            would exceed it is not begun; the first one always is.
        seconds: Most wall time; checked between outer steps.
        eval_every: Outer steps between evaluations of the search and test splits; the last step is
            always evaluated.
        retrain: Whether a finished trial is trained again from scratch with λ frozen, which tells
            what λ is worth without the path it was found on (Vicol et al. 2022). Costs as much
            plain training as the trial had.
        patience: Outer steps after the best evaluation of the search split after which the trial
            ends (early stopping), and so does the retraining after as many inner steps. Default: it
            goes on to its limit. Either way what counts is the best evaluation.

    Raises:
        UsageError: If no limit is given or one is not positive.

    Example:
        >>> import ift_tune
        >>> budget = ift_tune.Budget(outer_steps=100, eval_every=10)
        >>> budget.limited_to(seconds=60.0).outer_steps is None
        True
        >>> ift_tune.Budget()
        Traceback (most recent call last):
            ...
        ift_tune.base.errors.UsageError: a budget needs outer_steps, gradient_equivalents or seconds
    """

    outer_steps: int | None = None
    gradient_equivalents: float | None = None
    seconds: float | None = None
    eval_every: int = 1
    retrain: bool = True
    patience: int | None = None

    def __post_init__(self) -> None:
        take_plain(self)
        limits = (self.outer_steps, self.gradient_equivalents, self.seconds)
        if all(limit is None for limit in limits):
            raise UsageError("a budget needs outer_steps, gradient_equivalents or seconds")
        if self.outer_steps is not None:
            require_integer("outer_steps", self.outer_steps, 1)
        if self.gradient_equivalents is not None:
            require_number("gradient_equivalents", self.gradient_equivalents, above=0.0)
        if self.seconds is not None:
            require_number("seconds", self.seconds, above=0.0)
        require_integer("eval_every", self.eval_every, 1)
        require_flag("retrain", self.retrain)
        if self.patience is not None:
            require_integer("patience", self.patience, 1)

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain values, by which runs are compared.

        A patience that is not set is left out: runs of before it could be set go on.
        """
        found = asdict(self)
        return found if self.patience is not None else {k: found[k] for k in found if k != _LATER}

    def covers(self, other: Budget) -> bool:
        """Return whether a trial of the other length can go on to this one."""
        if (self.eval_every, self.retrain) != (other.eval_every, other.retrain):
            return False
        pairs = ((getattr(self, name), getattr(other, name)) for name in _LIMITS)
        return all(mine is None or (its is not None and mine >= its) for mine, its in pairs)

    def limited_to(
        self,
        *,
        outer_steps: int | None = None,
        gradient_equivalents: float | None = None,
        seconds: float | None = None,
    ) -> Budget:
        """Return the budget with these limits in place of its own; unchanged if none is given."""
        if outer_steps is None and gradient_equivalents is None and seconds is None:
            return self
        return replace(
            self,
            outer_steps=outer_steps,
            gradient_equivalents=gradient_equivalents,
            seconds=seconds,
        )
