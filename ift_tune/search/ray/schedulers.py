"""Ray Tune's schedulers by name, with settings that suit a budget and a space."""

from __future__ import annotations

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from ift_tune.config import Budget
from ift_tune.errors import UsageError, nearest
from ift_tune.search.space import MetaSpace

SCHEDULERS = ("none", "asha", "hyperband", "pbt")
PBT = "pbt"
_PERTURBATIONS = 5  # of a population in its life


def make_scheduler(name: str, space: MetaSpace, budget: Budget) -> TrialScheduler:
    """Return the scheduler called ``"none"``, ``"asha"``, ``"hyperband"`` or ``"pbt"``.

    Resources are counted as the budget counts them: in outer steps, gradient-equivalents or
    seconds. The metric and its mode come from the ``TuneConfig``.

    Raises:
        UsageError: If the name is another.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler {name!r}{nearest(name, SCHEDULERS)}")
    if name == "none":
        return FIFOScheduler()
    unit, most = clock(budget)
    if name == "asha":
        return ASHAScheduler(
            time_attr=unit, max_t=most, grace_period=max(1, most // 9), reduction_factor=3
        )
    if name == "hyperband":
        return HyperBandScheduler(time_attr=unit, max_t=most, reduction_factor=3)
    return PopulationBasedTraining(
        time_attr=unit,
        perturbation_interval=max(1, most // _PERTURBATIONS),
        hyperparam_mutations=space.to_ray(),
        custom_explore_fn=space.clipped,
        synch=True,  # else a population that does not run at the same time never exploits
        log_config=False,
    )


def clock(budget: Budget) -> tuple[str, int]:
    """Return the key of a result that counts what a trial uses, and how much it may use."""
    if budget.outer_steps is not None:
        return "outer_step", budget.outer_steps
    if budget.gradient_equivalents is not None:
        return "gradient_equivalents", max(1, int(budget.gradient_equivalents))
    return "wall_seconds", max(1, int(budget.seconds or 1))
