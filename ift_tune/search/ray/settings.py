"""Settings for a Tuner: run configuration, schedulers by name, and a stopper for divergence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    TrialScheduler,
)

from ift_tune.base.arguments import require_path
from ift_tune.base.direction import is_penalty
from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus, StopReason
from ift_tune.joint.config import Budget
from ift_tune.search.fidelity import GRADIENT_EQUIVALENTS, OUTER_STEPS, most
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray.population import SteadyTraining
from ift_tune.search.ray.session import OBJECTIVE
from ift_tune.search.ray.tables import TablesCallback
from ift_tune.search.space import Choice, Space


def recommended_run_config(
    directory: str | Path,
    name: str = "ray",
    *,
    tables: TablesCallback | None = None,
    checkpoint_every: int | None = 1,
    checkpoints_kept: int = 1,
    max_failures: int = 3,
    callbacks: Sequence[tune.Callback] = (),
    **more: Any,
) -> tune.RunConfig:
    """Return settings for a ``tune.Tuner`` under which nothing is lost.

    A checkpoint follows each result, and Ray's snapshot of the experiment each checkpoint, so a
    killed trial, node or driver costs one result at most. For models whose checkpoints are large,
    raise `checkpoint_every`; docs/cluster.md has the sizes.

    Args:
        directory: Ray's ``storage_path``: on a cluster, what all nodes can reach.
        name: Of the experiment, a folder there.
        tables: Default: our tables in the experiment's folder.
        checkpoint_every: Results between checkpoints; None for function trainables, which decide
            for themselves.
        checkpoints_kept: The latest so many of each trial; PBT needs a few.
        max_failures: How often a trial may be started again from its checkpoint.
        callbacks: Further ones.
        more: Further arguments of ``tune.RunConfig``, such as `stop` or `verbose`.

    Example:
        >>> from ift_tune import DivergenceStopper, recommended_run_config
        >>> config = recommended_run_config("runs", "mine", stop=DivergenceStopper(patience=2))
        >>> config.name, config.checkpoint_config.checkpoint_frequency
        ('mine', 1)
    """
    checkpoints: dict[str, Any] = {"num_to_keep": checkpoints_kept}
    if checkpoint_every is not None:
        checkpoints |= {"checkpoint_frequency": checkpoint_every, "checkpoint_at_end": True}
    place = str(directory)
    if "://" not in place:
        place = str(require_path("directory", place).resolve())
    return tune.RunConfig(
        name=name,
        storage_path=place,
        callbacks=[tables or TablesCallback(), *callbacks],
        checkpoint_config=tune.CheckpointConfig(**checkpoints),
        failure_config=tune.FailureConfig(max_failures=max_failures),
        **more,
    )


_PERTURBATIONS = 5  # of a population in its life


def make_scheduler(name: str, plan: SearchPlan) -> TrialScheduler:
    """Return the scheduler of a name, one of `SCHEDULERS`, for the trials of a plan.

    Resources are counted by the plan's fidelity; by default as the budget counts them: in outer
    steps, gradient-equivalents or seconds. Only the budget ends a trial that is among the best to
    the last. The metric and its mode come from the ``TuneConfig``.

    Raises:
        UsageError: If a population would not move in step, or the budget is not bounded in the
            fidelity, or the plan has no space.
    """
    if name == "none":
        return FIFOScheduler()
    budget, space = plan.trials.budget, plan.space
    if space is None:
        raise UsageError("there is nothing to search: give a space")
    if name in ("asha", "hyperband"):
        unit, limit = clock(plan, space)
        aim: dict[str, Any] = {
            "time_attr": unit,
            "max_t": limit,
            "reduction_factor": 3,
            "stop_last_trials": False,
        }
        if name == "hyperband":
            return HyperBandScheduler(**aim)
        return ASHAScheduler(**aim, grace_period=max(1, limit // 9))
    if plan.fidelity != OUTER_STEPS:
        raise UsageError(
            "pbt compares trials at the same outer step: use asha or hyperband, or leave the "
            f"fidelity out, got fidelity={plan.fidelity!r}"
        )
    if budget.outer_steps is None:
        raise UsageError("pbt compares trials at the same outer step: give their length in these")
    mutations = space.to_ray() | {
        key: list(d.options) for key, d in space.distributions.items() if isinstance(d, Choice)
    }
    return SteadyTraining(
        budget.eval_every,
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


def clock(plan: SearchPlan, space: Space) -> tuple[str, int]:
    """Return the key of a result that counts what a trial uses, and how much it may use."""
    budget, config = plan.trials.budget, plan.trials.config
    if plan.fidelity != OUTER_STEPS:
        return plan.fidelity, most(plan.fidelity, budget, config, space)
    if budget.outer_steps is not None:
        return OUTER_STEPS, budget.outer_steps
    if budget.gradient_equivalents is not None:
        return GRADIENT_EQUIVALENTS, math.ceil(budget.gradient_equivalents)
    return "wall_seconds", math.ceil(budget.seconds or 1)


class DivergenceStopper(tune.Stopper):
    """Stops a trial after so many results in a row that show divergence.

    A result shows it if its ``solve_status`` is one of `statuses`, or its objective is not finite
    or the penalty of a trial that diverged, whichever the direction of the search is.
    (A trial whose λ could not be moved five times in a row ends by itself.)

    Example:
        >>> from ift_tune import DivergenceStopper
        >>> stop = DivergenceStopper(patience=2)
        >>> statuses = ("diverged", "truncated", "diverged", "diverged")
        >>> [stop("a trial", {"solve_status": status}) for status in statuses]
        [False, False, False, True]
    """

    def __init__(
        self,
        patience: int = 3,
        *,
        statuses: Collection[SolveStatus] = (SolveStatus.DIVERGED, SolveStatus.NONFINITE),
        metric: str = OBJECTIVE,
    ) -> None:
        """Say what divergence is.

        Args:
            patience: Results in a row, at least 1.
            statuses: Of the linear solve.
            metric: Key of the value that has to be finite.

        Raises:
            UsageError: If `patience` is below 1.
        """
        if patience < 1:
            raise UsageError(f"patience must be at least 1, got {patience}")
        self._patience, self._metric = patience, metric
        self._statuses = frozenset(status.value for status in statuses)
        self._in_a_row: Counter[str] = Counter()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether to stop the trial, and say in the result that it has diverged."""
        value = result.get(self._metric, 0.0)
        bad = result.get("solve_status") in self._statuses
        if bad or not math.isfinite(value) or is_penalty(value):
            self._in_a_row[trial_id] += 1
        else:
            self._in_a_row[trial_id] = 0
        stops = self._in_a_row[trial_id] >= self._patience
        if stops and not result.get("stop_reason"):
            # Other stop criteria end a trial as done. Ray hands this very result on.
            result["stop_reason"] = StopReason.DIVERGED.value
        return stops

    def stop_all(self) -> bool:
        """Never stop the whole search."""
        return False
