"""Ray Tune's schedulers by name, with settings that suit a budget and a space."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from ift_tune.config import Budget
from ift_tune.errors import UsageError, nearest
from ift_tune.search.distributions import Choice
from ift_tune.search.space import MetaSpace

SCHEDULERS = ("none", "asha", "hyperband", "pbt")
PBT = "pbt"
_PERTURBATIONS = 5  # of a population in its life


def make_scheduler(name: str, space: MetaSpace, budget: Budget) -> TrialScheduler:
    """Return the scheduler called ``"none"``, ``"asha"``, ``"hyperband"`` or ``"pbt"``.

    Resources are counted as the budget counts them: in outer steps, gradient-equivalents or
    seconds. Only the budget ends a trial that is among the best to the last. The metric and its
    mode come from the ``TuneConfig``.

    Raises:
        UsageError: If the name is another, or a population would not move in step.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler {name!r}{nearest(name, SCHEDULERS)}")
    if name == "none":
        return FIFOScheduler()
    unit, most = clock(budget)
    if name in ("asha", "hyperband"):
        aim: dict[str, Any] = {
            "time_attr": unit,
            "max_t": most,
            "reduction_factor": 3,
            "stop_last_trials": False,
        }
        if name == "hyperband":
            return HyperBandScheduler(**aim)
        return ASHAScheduler(**aim, grace_period=max(1, most // 9))
    if budget.outer_steps is None:
        raise UsageError("pbt compares trials at the same outer step: give their length in these")
    mutations = space.to_ray() | {
        key: list(d.options) for key, d in space.distributions.items() if isinstance(d, Choice)
    }
    return PopulationBasedTraining(
        time_attr="training_iteration",  # on which a member that has diverged keeps step too
        perturbation_interval=max(1, iterations(budget) // _PERTURBATIONS),
        hyperparam_mutations=mutations,
        custom_explore_fn=space.clipped,
        synch=True,  # else a population that does not run at the same time never exploits
        log_config=False,
    )


def iterations(budget: Budget) -> int:
    """Return how many results a trial reports whose length is given in outer steps, else 0."""
    return math.ceil((budget.outer_steps or 0) / budget.eval_every)


def clock(budget: Budget) -> tuple[str, int]:
    """Return the key of a result that counts what a trial uses, and how much it may use."""
    if budget.outer_steps is not None:
        return "outer_step", budget.outer_steps
    if budget.gradient_equivalents is not None:
        return "gradient_equivalents", math.ceil(budget.gradient_equivalents)
    return "wall_seconds", math.ceil(budget.seconds or 1)
