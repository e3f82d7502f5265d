"""Plain training with frozen hyperparameters: what black-box arms are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from ift_tune.base.columns import COARSE_PREFIX
from ift_tune.base.status import StopReason
from ift_tune.compare.scored import MEASURED, RETRAINED, ScoredTrial
from ift_tune.hyper import HyperKind
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.trial import ProblemFactory

EVALUATIONS = 20  # of the search split in a plain training
PATIENCE = 5  # evaluations without a better one, after which a plain training ends

Prepare: TypeAlias = Callable[[BilevelProblem], None]
"""Sets the hyperparameters of a new problem, before they are frozen."""


class BaselineTrial(ScoredTrial):
    """Plain training with frozen hyperparameters, evaluated on the way and stopped early.

    It is its own retraining: what it measures at its best moment is what a second run would.

    Attributes:
        worth: The metrics of the best moment, as ``retrained_test_error``, ...
    """

    def __init__(
        self,
        problem_factory: ProblemFactory,
        config: MetaConfig,
        budget: Budget,
        *,
        training_steps: int,
        prepare: Prepare | None = None,
        point: Mapping[str, Any] | None = None,
        train_on_val: bool = False,
        seed: int = 0,
        device: str | torch.device = "auto",
        metric: str | None = None,
    ) -> None:
        """Describe the training; see `ScoredTrial`.

        Args:
            problem_factory: See `Trial`.
            config: Its inner optimiser and learning rate are used.
            budget: At most that of `baseline_budget`.
            training_steps: See `ScoredTrial`.
            prepare: Sets the hyperparameters. Default: they stay as the task initialises them.
            point: What was set, for the tables.
            train_on_val: Whether to train on the validation split too.
            seed: See `Trial`.
            device: See `Trial`.
            metric: See `Trial`.
        """
        super().__init__(
            problem_factory,
            config.updated({"inner_steps": block(training_steps)}),
            budget,
            training_steps=training_steps,
            seed=seed,
            device=device,
            metric=metric,
        )
        self._prepare, self._point, self._pooled = prepare, dict(point or {}), train_on_val
        self.worth: dict[str, float] = {}

    def setup(self) -> None:
        """Build the problem and set its hyperparameters."""
        super().setup()
        if self._prepare is not None:
            self._prepare(self.joint.problem)

    def step(self) -> dict[str, Any] | None:
        """Train for a block of inner steps and evaluate."""
        row = super().step()
        if row is not None and self.stop_reason is None and self._stale(row["step"]):
            self.stop_reason = StopReason.DONE
        return row

    def constants(self) -> dict[str, Any]:
        """Return the inner settings and the point; those of the outer step have no meaning."""
        kept = ("seed", "device", "inner_lr", "inner_steps", "inner_optimizer")
        constants = super().constants()
        inner = {k: v if k in kept else None for k, v in constants.items()}
        return inner | {f"{COARSE_PREFIX}{name}": value for name, value in self._point.items()}

    @property
    def retrains(self) -> bool:
        """False: it is its own retraining."""
        return False

    def _snapshot(self) -> dict[str, Any]:
        """Return nothing: the tables have the point."""
        return {}

    def _stale(self, step: int) -> bool:
        """Return whether the best evaluation is so old that no better one is waited for."""
        return self._best is not None and step - int(self._best["step"]) >= PATIENCE

    def _advance(self) -> dict[str, float]:
        return self.joint.baseline_step(train_on_val=self._pooled)

    def _max_step_cost(self) -> float:
        return self.joint.max_step_cost(plain=True, train_on_val=self._pooled)

    def _look(self, row: Mapping[str, Any]) -> None:
        before = self._best
        super()._look(row)
        if self._best is not before:
            measured = {k: v for k, v in row.items() if k.startswith(MEASURED)}
            self.worth = {f"{RETRAINED}{k}": v for k, v in measured.items()}

    def _worth(self, cost: float) -> dict[str, float]:
        return self.worth

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"worth": self.worth}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.worth = state["worth"]


def block(training_steps: int) -> int:
    """Return the inner steps between two evaluations of a plain training."""
    return math.ceil(training_steps / EVALUATIONS)


def baseline_budget(training_steps: int) -> Budget:
    """Return the length of a whole plain training."""
    return Budget(outer_steps=math.ceil(training_steps / block(training_steps)))


def turned(knobs: Mapping[str, float]) -> Prepare:
    """Return what turns a problem's knobs."""

    def prepare(problem: BilevelProblem) -> None:
        if isinstance(problem.hyper, HyperKind):
            problem.hyper.set_coarse(knobs)

    return prepare
