"""What a comparison is: one task, one budget, the same seeds and baseline trainings for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ift_tune.base.arguments import require_text
from ift_tune.base.direction import Direction, direction_of
from ift_tune.base.errors import UsageError, require_integer
from ift_tune.base.identity import factory_name
from ift_tune.base.status import TrialStatus
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.factory import build_problem, require_factory
from ift_tune.trial.plan import check_problem
from ift_tune.trial.scored import BestEvaluation
from ift_tune.trial.selection import SelectingTrial, score_of
from ift_tune.trial.tables import COST_COLUMNS
from ift_tune.trial.training import BaselineTraining
from ift_tune.trial.trial import ProblemFactory, Trial, require_trial


@dataclass(frozen=True)
class Comparison:
    """What all arms share. Picklable when its factory is.

    Attributes:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        budget: Of each search, that is of an arm with a seed, all its trials together: in
            ``gradient_equivalents`` (the same tables each time) or in ``seconds``. Counted alike
            for all. Retraining is for the report and free, and so is, where the budget is
            counted, the test split.
        task: Name in the tables.
        config: The task's settings: those of the IFT arms; its inner optimiser and learning rate
            are where the others start.
        trial_budget: Length of a trial where an arm runs several IFT trials.
        training_steps: Inner steps of a plain training: the trials of the black-box arms, and the
            retrainings by which all arms are compared.
        device: Where trials run.
        metric: The search metric that decides; see `Trial`.
        mode: ``"min"`` or ``"max"``: its direction; see `Trial`.

    Raises:
        UsageError: If a value is out of range, or metric and mode do not go together.

    Example:
        >>> from ift_tune import Budget, Comparison, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> comparison = Comparison(problem, Budget(gradient_equivalents=500), training_steps=100)
        >>> comparison.cost, comparison.limit
        ('gradient_equivalents', 500.0)
    """

    problem_factory: ProblemFactory
    budget: Budget
    task: str = "custom"
    config: MetaConfig = MetaConfig()  # noqa: RUF009 (frozen)
    trial_budget: Budget = Budget(outer_steps=50)  # noqa: RUF009 (frozen)
    training_steps: int = 1000
    device: str = "auto"
    metric: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        direction_of(self.metric, self.mode)
        require_integer("training_steps", self.training_steps, 1)
        require_factory(self.problem_factory)
        require_trial(self.config, self.trial_budget, self.metric)
        require_trial(self.config, self.budget, self.metric)
        require_text("task", self.task)
        b = self.budget
        if b.outer_steps is not None or (b.gradient_equivalents is None) == (b.seconds is None):
            raise UsageError(
                "the budget of a comparison is in gradient_equivalents or in seconds: outer steps "
                "cost each arm something else"
            )

    @property
    def direction(self) -> Direction:
        """In which the metric is better."""
        return direction_of(self.metric, self.mode)

    @property
    def cost(self) -> str:
        """The column that the budget counts."""
        counted = self.budget.gradient_equivalents is not None
        return "gradient_equivalents" if counted else COST_COLUMNS[0]

    @property
    def limit(self) -> float:
        """The budget as a number."""
        limit = self.budget.gradient_equivalents or self.budget.seconds
        return float(limit or 0.0)

    def within(self, length: Budget, search_state: SearchState) -> Budget:
        """Return the length of a trial, cut to what is left for the search."""
        left = max(self.limit - search_state.spent, 1e-9)  # a budget of nothing is refused
        if self.budget.gradient_equivalents is not None:
            own = length.gradient_equivalents
            return replace(length, gradient_equivalents=left if own is None else min(own, left))
        own = length.seconds
        return replace(length, seconds=left if own is None else min(own, left))

    def part(self, share: float, *, eval_every: int = 1) -> Budget:
        """Return a part of the budget, as the length of a trial."""
        whole = self.budget.gradient_equivalents
        if whole is not None:
            return Budget(gradient_equivalents=share * whole, eval_every=eval_every)
        return Budget(seconds=share * self.limit, eval_every=eval_every)

    def check(self, device: torch.device, seed: int) -> None:
        """Build the problem once, for nothing: mistakes and missing data show before anything runs.

        Raises:
            UsageError: If the problem is not right.
        """
        problem = build_problem(self.problem_factory, self.config, device, seed)
        check_problem(problem, self.metric, self.config)

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides the numbers, but for the device."""
        return {
            "task": self.task,
            "factory": factory_name(self.problem_factory),
            "backend": "compare",
            "budget": self.budget.to_plain(),
            "config": self.config.to_flat(),
            "trial_budget": self.trial_budget.to_plain(),
            "training_steps": self.training_steps,
            "metric": self.metric,
            "mode": self.direction.value,
        }


@dataclass(frozen=True)
class SearchState:
    """How far a search has come before a trial.

    Attributes:
        spent: What the trials before it have cost, those that failed among them.
        best: The best value among them; the worst possible if there is none.
        trials: How many of them have not failed: one that has is no groundwork of the others.
        exhausted: Whether the last of them could not do anything.
        kept: The file with the model and λ of the trial that the others build on, see
            `TrialKind.groundwork`; None if there is none.
    """

    spent: float
    best: float
    trials: int
    exhausted: bool
    kept: Path | None = None


def search_state(
    facts: Mapping[int, Mapping[str, Any]],
    cost: str,
    before: int | None = None,
    direction: Direction = Direction.MIN,
) -> SearchState:
    """Return how a search stands from what is recorded of its trials.

    Args:
        facts: By trial number; see `TrialRecord.facts`.
        cost: Which column is the cost.
        before: The number of the trial that is about to begin; None counts all.
        direction: In which a value is better.
    """
    earlier = [facts[n] for n in sorted(facts) if before is None or n < before]
    costs = [float(f.get(cost) or 0.0) for f in earlier]
    sound = [f for f in earlier if f.get("status") != TrialStatus.FAILED]
    values = [float(f["best_value"]) for f in sound if f.get("best_value") is not None]
    # A trial that could not pay for one step has cost nothing.
    unpaid = bool(costs) and costs[-1] == 0.0
    return SearchState(
        spent=sum(costs),
        best=direction.best(values),
        trials=len(sound),
        exhausted=unpaid and earlier[-1].get("status") == TrialStatus.PRUNED,
    )


EARLY_STOPPING_PATIENCE = 5  # evaluations without a better one after which a baseline ends


def baseline_trial(
    problem_factory: ProblemFactory,
    config: MetaConfig,
    training: BaselineTraining,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    metric: str | None = None,
    mode: str | None = None,
    keep_model: bool = False,
) -> Trial:
    """Return a plain training that the search split stops early, and whose best evaluation counts.

    Args:
        problem_factory: Builds the problem, with λ as it shall stay.
        config: Its inner optimiser and learning rate are used.
        training: How long, and on which splits.
        budget: Default: the whole of `training`.
        seed: See `Trial`.
        device: See `Trial`.
        metric: See `Trial`.
        mode: See `Trial`.
        keep_model: See `BestEvaluation`.
    """
    return Trial(
        problem_factory,
        config,
        training.length if budget is None else budget,
        seed=seed,
        device=device,
        metric=metric,
        mode=mode,
        training=training,
        selection=BestEvaluation(patience=EARLY_STOPPING_PATIENCE, keep_model=keep_model),
    )


@dataclass(frozen=True)
class BaselineRetraining:
    """Scores a trial's λ by a baseline training from scratch, the same that black-box arms do.

    Attributes:
        steps: Inner steps of the whole training, which may stop early.
    """

    steps: int

    def __call__(self, trial: SelectingTrial) -> dict[str, float]:
        """Return the metrics of both splits at its best evaluation; none if it had none."""
        return score_of(trial.train_plainly(*self.training()))

    def training(self) -> tuple[BaselineTraining, int]:
        """Return the training, and its patience."""
        return BaselineTraining(self.steps), EARLY_STOPPING_PATIENCE
