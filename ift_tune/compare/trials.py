"""The trials that a comparison is made of: scored by their best moment, retrained from there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ift_tune.config import Budget, MetaConfig
from ift_tune.errors import NonFiniteError
from ift_tune.hyper import HyperKind
from ift_tune.problem import BilevelProblem
from ift_tune.search import ProblemFactory, Trial
from ift_tune.search.trial import OUT_OF_MEMORY
from ift_tune.types import StopReason

EVALUATIONS = 20  # of the search split in a plain training
PATIENCE = 5  # evaluations without a better one, after which a plain training ends
RETRAINING_RATIO = 2.0  # of costs between two retrainings on the way
KNOB = "knob."  # how the columns of what a plain training was given begin
_SPLITS = ("search_", "test_")

Prepare = Callable[[BilevelProblem], None]
"""Sets the hyperparameters of a new problem, before they are frozen."""


class SelectedTrial(Trial):
    """An IFT trial whose result is its best evaluation on the search split, not its last.

    The hyperparameters of that moment are what it has found. To know what they are worth, plain
    trainings start from scratch with them frozen: whenever the cost has doubled since the last
    one, and at the end. Those are for the report alone and are not charged.
    """

    def __init__(
        self,
        problem_factory: ProblemFactory,
        config: MetaConfig,
        budget: Budget,
        *,
        training_steps: int,
        bar: float = math.inf,
        seed: int = 0,
        device: str | torch.device = "auto",
        metric: str | None = None,
    ) -> None:
        """Describe the trial.

        Args:
            problem_factory: See `Trial`.
            config: See `Trial`.
            budget: See `Trial`; a counted limit is never exceeded, by a first step neither.
            training_steps: Inner steps of a plain training.
            bar: The best value of the search so far: only what is better is retrained.
            seed: See `Trial`.
            device: See `Trial`.
            metric: See `Trial`.
        """
        super().__init__(problem_factory, config, budget, seed=seed, device=device, metric=metric)
        self._training_steps, self._bar = training_steps, bar
        self._best: dict[str, Any] | None = None
        self._retrained: dict[str, Any] = {"step": 0, "cost": 0.0}

    def setup(self) -> None:
        """Build the problem; the trial is over if not even one step can be paid."""
        super().setup()
        if not self._affordable(due=False):
            self.stop_reason = StopReason.PRUNED

    @property
    def value(self) -> float | None:
        """The best value of `metric` so far; None before the first evaluation."""
        return None if self._best is None else float(self._best["value"])

    def step(self) -> dict[str, Any] | None:
        """Take one outer step; see `Trial.step`.

        Returns:
            The row, with ``best_value`` and ``best_step`` so far where the search split was
            evaluated, and ``retrained_...`` where they were measured.
        """
        row = super().step()
        if row is None or self.metric not in row:
            return row
        self._look(row)
        new = self._best_so_far() | self._worth(row["gradient_equivalents"])
        self.metrics |= new
        return row | {f"retrained_{k}": None for k in row if k.startswith(_SPLITS)} | new

    def finish(self) -> dict[str, float]:
        """Return what was learned, and what it is worth, at the best moment."""
        if self._best is None:
            return {}
        if self._best["found"]:
            self.joint.problem.hyper.load_state_dict(self._best["found"])
        learned = {k: float(v) for k, v in self.joint.problem.summary().items()}
        found = {f"learned_{k}": value for k, value in learned.items() if math.isfinite(value)}
        return found | self._worth(math.inf)

    @property
    def retrains(self) -> bool:
        """Whether `finish` will train again."""
        return self._due(math.inf)

    def found(self) -> dict[str, Any]:
        """Return the hyperparameters of the best moment."""
        return self._snapshot() if self._best is None else dict(self._best["found"])

    def totals(self) -> dict[str, float]:
        """Return the costs, and the best value with its step."""
        return super().totals() | self._best_so_far()

    def retrain(self) -> dict[str, float]:
        """Train from scratch with the best hyperparameters frozen, and the same early stopping.

        Returns:
            The metrics of both splits at the best evaluation, as ``retrained_test_error``, ...;
            none if it is not finite or out of memory.
        """
        found = self.found()
        training = PlainTrial(
            self._factory,
            self.config,
            plain_budget(self._training_steps),
            training_steps=self._training_steps,
            prepare=lambda problem: _load(problem, found),
            seed=self.seed,
            device=self.device,
            metric=self._metric,
        )
        training.setup()
        while training.stop_reason is None:
            training.step()
        return training.worth

    def _snapshot(self) -> dict[str, Any]:
        """Return copies of the hyperparameters as they are."""
        return {k: v.clone() for k, v in super().found().items()}

    def _best_so_far(self) -> dict[str, float]:
        if self._best is None:
            return {}
        return {"best_value": self._best["value"], "best_step": self._best["step"]}

    def _look(self, row: Mapping[str, Any]) -> None:
        """Note the moment if it is the best so far."""
        value = row[self.metric]
        if self._best is None or value < self._best["value"]:
            self._best = {
                "value": value,
                "step": row["step"],
                "found": self._snapshot(),
            }

    def _due(self, cost: float) -> bool:
        """Return whether the best moment is to be retrained now."""
        return (
            self._best is not None
            and self._best["value"] < self._bar
            and self._best["step"] > self._retrained["step"]
            and cost >= RETRAINING_RATIO * self._retrained["cost"]
        )

    def _worth(self, cost: float) -> dict[str, float]:
        """Return what the best moment is worth after retraining, if it is time to know."""
        if not self._due(cost) or self._best is None:
            return {}
        found: dict[str, Any] = {k: None for k in self.metrics if k.startswith("retrained_")}
        with contextlib.suppress(NonFiniteError, *OUT_OF_MEMORY):
            found |= self.retrain()
        self._retrained = {"step": self._best["step"], "cost": cost}
        return found

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"best": self._best, "retrained": self._retrained}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._best, self._retrained = state["best"], state["retrained"]


class PlainTrial(SelectedTrial):
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
        pooled: bool = False,
        seed: int = 0,
        device: str | torch.device = "auto",
        metric: str | None = None,
    ) -> None:
        """Describe the training; see `SelectedTrial`.

        Args:
            problem_factory: See `Trial`.
            config: Its inner optimiser and learning rate are used.
            budget: At most that of `plain_budget`.
            training_steps: See `SelectedTrial`.
            prepare: Sets the hyperparameters. Default: they stay as the task initialises them.
            point: What was set, for the tables.
            pooled: Whether to train on the validation split too.
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
        self._prepare, self._point, self._pooled = prepare, dict(point or {}), pooled
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
        return inner | {f"{KNOB}{name}": value for name, value in self._point.items()}

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
        return self.joint.plain_step(pooled=self._pooled)

    def _dearest_step(self) -> float:
        return self.joint.dearest_step(plain=True, pooled=self._pooled)

    def _look(self, row: Mapping[str, Any]) -> None:
        before = self._best
        super()._look(row)
        if self._best is not before:
            measured = {k: v for k, v in row.items() if k.startswith(_SPLITS)}
            self.worth = {f"retrained_{k}": v for k, v in measured.items()}

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


def plain_budget(training_steps: int) -> Budget:
    """Return the length of a whole plain training."""
    return Budget(outer_steps=math.ceil(training_steps / block(training_steps)))


def turned(knobs: Mapping[str, float]) -> Prepare:
    """Return what turns a problem's knobs."""

    def prepare(problem: BilevelProblem) -> None:
        if isinstance(problem.hyper, HyperKind):
            problem.hyper.turn(knobs)

    return prepare


def _load(problem: BilevelProblem, state: Mapping[str, Any]) -> None:
    problem.hyper.load_state_dict(state)
