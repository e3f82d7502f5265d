"""In what a trial's progress is counted when it is compared with others before its end."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.pruners import BasePruner, PatientPruner, PercentilePruner, WilcoxonPruner

from ift_tune.base.errors import UsageError, nearest
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.cost import GRADIENT, HVP
from ift_tune.search.space import Choice, Space
from ift_tune.trial.trial import Trial

OUTER_STEPS = "outer_steps"
INNER_STEPS = "inner_steps"
HVPS = "hvps"
GRADIENT_EQUIVALENTS = "gradient_equivalents"

FIDELITIES = (OUTER_STEPS, INNER_STEPS, HVPS, GRADIENT_EQUIVALENTS)
"""Each counts what a trial has used since its start.

Trials with few terms and inner steps get further with the same outer steps in the last three.
"""

_PRICES = {INNER_STEPS: GRADIENT, HVPS: HVP, GRADIENT_EQUIVALENTS: 1.0}
_UNBOUNDED = sys.maxsize  # weights of a model that nobody knows


def require_fidelity(name: object) -> None:
    """Raise a `UsageError` unless it is one of `FIDELITIES`."""
    if name not in FIDELITIES:
        raise UsageError(f"unknown fidelity {name!r}{nearest(str(name), FIDELITIES)}, got {name!r}")


def used(trial: Trial, fidelity: str) -> float:
    """Return how much a trial has used so far; nothing before it is set up."""
    if not trial.ready:
        return 0.0
    joint = trial.joint
    return {
        OUTER_STEPS: joint.outer_steps,
        INNER_STEPS: joint.inner_steps,
        HVPS: joint.cost.hvps,
        GRADIENT_EQUIVALENTS: joint.cost.gradient_equivalents,
    }[fidelity]


def most(fidelity: str, budget: Budget, config: MetaConfig, space: Space) -> int:
    """Return how much a trial can use within its budget, whatever its point.

    Args:
        fidelity: One of `FIDELITIES`, not the outer steps.
        budget: Of the trial.
        config: What does not vary.
        space: What varies.

    Raises:
        UsageError: If the budget does not say, or no trial uses any.

    Example:
        >>> from ift_tune import Budget, Int, MetaConfig, MetaSpace
        >>> from ift_tune.search.fidelity import most
        >>> space = MetaSpace({"inner_steps": Int(5, 50)})
        >>> most("inner_steps", Budget(outer_steps=10), MetaConfig(), space)
        500
        >>> most("hvps", Budget(gradient_equivalents=1000.0), MetaConfig(), space)
        500
    """
    bounds: list[float] = []
    if budget.gradient_equivalents is not None:
        bounds.append(budget.gradient_equivalents / _PRICES[fidelity])
    if budget.outer_steps is not None and fidelity != GRADIENT_EQUIVALENTS:
        per_step = max(_per_step(fidelity, c) for c in _dearest(config, space))
        if per_step == 0:
            raise UsageError(
                f"no trial of this space uses any {fidelity}: choose another fidelity, got "
                f"fidelity={fidelity!r}"
            )
        if per_step < _UNBOUNDED:
            bounds.append(budget.outer_steps * per_step)
    if not bounds:
        raise UsageError(
            f"this budget does not say how many {fidelity} a trial may use: give its length in "
            f"gradient_equivalents (--budget), got {_in_words(budget)}"
        )
    return max(1, math.ceil(min(bounds)))


def require_comparable(pruner: BasePruner, fidelity: str) -> None:
    """Raise a `UsageError` if a pruner compares equal steps alone, and trials share none."""
    if fidelity == OUTER_STEPS:
        return
    inner = pruner._wrapped_pruner if isinstance(pruner, PatientPruner) else pruner
    if isinstance(inner, PercentilePruner | WilcoxonPruner):
        raise UsageError(
            f"{type(inner).__name__} compares trials at exactly the same step, which they do not "
            f"share in {fidelity}: use Optuna's Hyperband or successive halving (asha), or "
            f"fidelity='outer_steps', got fidelity={fidelity!r}"
        )


def _per_step(fidelity: str, config: MetaConfig) -> int:
    """Return the most that one outer step can use."""
    if fidelity == INNER_STEPS:
        return config.inner_steps
    products = config.inverse.max_hvps(_UNBOUNDED, False)
    if products >= _UNBOUNDED:
        return _UNBOUNDED
    return products + config.warm_start + (config.inverse.measured != "never")


def _dearest(config: MetaConfig, space: Space) -> Iterator[MetaConfig]:
    """Return the configurations of which one uses the most: every choice, ranges at their ends."""
    choices = {k: d.options for k, d in space.distributions.items() if isinstance(d, Choice)}
    high: Mapping[str, Any] = {
        key: d.high for key, d in space.distributions.items() if not isinstance(d, Choice)
    }
    for options in itertools.product(*choices.values()):
        point = {**high, **dict(zip(choices, options, strict=True))}
        yield config.updated(space.applicable(point))


def _in_words(budget: Budget) -> str:
    limits = {
        "outer_steps": budget.outer_steps,
        "gradient_equivalents": budget.gradient_equivalents,
        "seconds": budget.seconds,
    }
    return " and ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
