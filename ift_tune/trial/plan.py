"""What all trials of a search have in common, and the mistakes that show before the first."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ift_tune.base.arguments import require_seed
from ift_tune.base.direction import Direction, chosen_metric
from ift_tune.base.identity import factory_name
from ift_tune.base.objectives import Names, Objectives
from ift_tune.base.randomness import RandomStream
from ift_tune.base.status import NUMBER_COLUMNS, PEAK_MEMORY
from ift_tune.joint.callbacks import Callback, joint_callbacks
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.batches import Batch, to_device
from ift_tune.problem.begun_again import REPEATABLE, begins_again
from ift_tune.problem.evaluation import as_numbers, measured
from ift_tune.problem.factory import build_problem, require_factory
from ift_tune.problem.loaders import first_batch
from ift_tune.problem.micro_batches import rows_of
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_loss, as_penalty, as_words
from ift_tune.trial.team import require_processes
from ift_tune.trial.trial import OUT_OF_MEMORY, ProblemFactory, Trial, require_trial

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialPlan:
    """Makes trials that differ in some meta-hyperparameters. Picklable when its factory is.

    Attributes:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        budget: Length of each trial.
        config: What does not vary.
        seed: Of every trial's problem: all trials see the same splits and initial weights.
        device: Where trials run.
        metric: The search metric that decides, see `Trial`; or several, see `Objectives`.
        mode: ``"min"`` or ``"max"``, see `Trial`; for several metrics, one for each.
        callbacks: Those of the given ones that override a hook of the optimisation: each trial's
            process has them.
        constraints: Such as ``"alpha_lambda_max<=2"``: what the best trial has to keep.
        processes: How many share each trial, see `Trial`; no number depends on it, to rounding.

    Raises:
        UsageError: If the factory cannot be called, a callback is none, or metric, mode and
            constraints do not go together.
    """

    problem_factory: ProblemFactory
    budget: Budget
    config: MetaConfig = field(default_factory=MetaConfig)
    seed: int = 0
    device: str = "auto"
    metric: Names = None
    mode: Names = None
    callbacks: Sequence[Callback] = ()
    constraints: Sequence[str] = ()
    processes: int = 1

    def __post_init__(self) -> None:
        require_factory(self.problem_factory)
        require_processes(self.processes)
        require_trial(self.config, self.budget, self.objectives.metric)
        object.__setattr__(self, "seed", require_seed(self.seed))
        # The others may hold what cannot be pickled, such as a terminal.
        object.__setattr__(self, "callbacks", joint_callbacks(self.callbacks))

    @property
    def objectives(self) -> Objectives:
        """What the search is after."""
        return Objectives.of(self.metric, self.mode, self.constraints)

    @property
    def direction(self) -> Direction:
        """In which the metric that decides within a trial is better."""
        return self.objectives.direction

    def trial(
        self, changes: Mapping[str, Any] | None = None, device: str | torch.device | None = None
    ) -> Trial:
        """Return a trial, not yet set up.

        Args:
            changes: Flat `MetaConfig` keys in which it differs from `config`.
            device: Where it runs; default: the plan's.

        Raises:
            UsageError: If a key or value is wrong.
        """
        return Trial(
            self.problem_factory,
            self.config.updated(changes or {}),
            self.budget,
            seed=self.seed,
            device=self.device if device is None else device,
            metric=self.objectives.metric,
            mode=self.direction.value,
            callbacks=self.callbacks,
            processes=self.processes,
            further=[m for m in map(str, self.objectives.metrics[1:]) if m.startswith("search_")],
        )

    def check(self, device: torch.device, changes: Mapping[str, Any] | None = None) -> None:
        """Build the problem once, for nothing: mistakes and missing data show before anything runs.

        Args:
            device: Where.
            changes: Flat `MetaConfig` keys in which its configuration differs from `config`.

        Raises:
            UsageError: If the problem is not right.
        """
        config = self.config.updated(changes or {})
        problem = build_problem(self.problem_factory, config, device, self.seed)
        objectives = self.objectives
        columns = check_problem(problem, objectives.metric, config)
        if self.processes > 1:
            shared = self.trial(changes, device)
            try:
                shared.setup()  # which looks at the shares
            finally:
                shared.cleanup()
        if not self.callbacks:  # they may add columns of their own
            told = self.device != "cpu" and torch.cuda.device_count()
            objectives.check(columns - (set() if told else {PEAK_MEMORY}))

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides the numbers, but for the device."""
        return {
            "factory": factory_name(self.problem_factory),
            "seed": self.seed,
            "config": self.config.to_flat(),
            "budget": self.budget.to_plain(),
            **self.objectives.settings(),
        }


def check_problem(problem: BilevelProblem, metric: str | None, config: MetaConfig) -> set[str]:
    """Look for mistakes in a problem, on one batch of its search split.

    Args:
        problem: It stays as it is.
        metric: The search metric; see `Trial`.
        config: Of its trial.

    Returns:
        The columns that a trial's row has numbers in, those of the test split aside.

    Raises:
        UsageError: If the problem is not right, or does not measure the metric.
    """
    problem.validate()
    device = problem.weights()[0].device
    # Loaders and metrics may draw; what the caller draws afterwards does not depend on that.
    with RandomStream(0, device).aside():
        firsts = {
            name: to_device(first_batch(name, loader), device)
            for name, loader in vars(problem.splits).items()
            if loader is not None
        }
        _warn_of_passes_that_cannot_be_begun_again(problem, device)
        _check_losses(problem, firsts)
        if config.signal_every:
            rows_of(firsts["val"])  # which has to be cut
        learned = as_numbers(problem.summary(), "summary")
        as_words(problem.words())
        with evaluating(problem.model):
            found = measured(lambda: problem.evaluate([firsts["search"]]))
    chosen_metric(metric, {f"search_{name}" for name in found})
    columns = {f"{split}_{name}" for split in ("train", "val", "search") for name in found}
    return columns | {f"learned_{name}" for name in learned} | set(NUMBER_COLUMNS)


def _warn_of_passes_that_cannot_be_begun_again(
    problem: BilevelProblem, device: torch.device
) -> None:
    walked = {name: loader for name, loader in vars(problem.splits).items() if loader is not None}
    names = [
        name
        for name in ("train", "val", "curvature")
        if name in walked and not begins_again(walked[name], device)
    ]
    if names:
        _log.warning(
            "a run that is interrupted cannot be resumed: the order of the %s loader is another "
            "one each time that a pass is begun, at the same random numbers too; %s",
            " and the ".join(names),
            REPEATABLE,
        )


def _check_losses(problem: BilevelProblem, batches: Mapping[str, Batch]) -> None:
    """Look at what the losses and the penalty return; the problem stays as it is.

    Raises:
        UsageError: If one returns something else than it shall.
    """
    again = copy.copy(problem)  # so that a loss that counts its calls counts those of training
    as_penalty(again.penalty())
    with contextlib.suppress(*OUT_OF_MEMORY):
        with preserved_buffers(problem.model):
            as_loss(again.train_loss(batches["train"]), "train_loss")
        with evaluating(problem.model):
            as_loss(again.val_loss(batches["val"]), "val_loss")
