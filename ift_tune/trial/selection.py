"""Which evaluation is a trial's result: the last, or the best with early stopping and a score."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from ift_tune.base.direction import Direction
from ift_tune.base.errors import require_integer
from ift_tune.base.status import StopReason
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.problem import BilevelProblem

RETRAINING_RATIO = 2.0  # of costs between two retrainings on the way
RETRAINED = "retrained_"
_MEASURED = ("search_", "test_")


class SelectingTrial(Protocol):
    """What a selection sees of its trial."""

    config: MetaConfig
    budget: Budget
    seed: int
    device: torch.device
    joint: JointOptimizer
    metrics: dict[str, Any]
    stop_reason: StopReason | None
    direction: Direction

    @property
    def metric(self) -> str:
        """The column that decides."""

    def learned(self) -> dict[str, Any]:
        """Return what λ has become."""

    def rebuild(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem built anew, with λ as found."""

    def retrain(self) -> dict[str, float]:
        """Train afresh with λ frozen as found; nothing if that breaks."""


class Selection(abc.ABC):
    """Which evaluation of the search split is a trial's result.

    It remembers the evaluations it has seen, so every trial takes a copy for itself.

    Attributes:
        first_step_free: Whether the first step is taken whatever it costs.
    """

    first_step_free: ClassVar[bool]

    @abc.abstractmethod
    def evaluated(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Note a step, and return its further columns; what is known is noted as metrics too."""

    @abc.abstractmethod
    def stops_early(self, step: int) -> bool:
        """Return whether no better evaluation is waited for after this step."""

    @abc.abstractmethod
    def value(self, trial: SelectingTrial) -> float | None:
        """Return the value of the trial; None before the first evaluation."""

    @abc.abstractmethod
    def found(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return the state of the hyperparameters at the evaluation that is the result."""

    @abc.abstractmethod
    def retrains(self, trial: SelectingTrial) -> bool:
        """Return whether `finish` will train again."""

    @abc.abstractmethod
    def retrain(self, trial: SelectingTrial) -> dict[str, float]:
        """Train afresh with λ frozen as found, and return what is measured."""

    @abc.abstractmethod
    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what is measured once, at the end."""

    @abc.abstractmethod
    def totals(self) -> dict[str, float]:
        """Return further columns of the trial as a whole."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed trial needs, as entries of the trial's checkpoint."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's entries."""


class LastEvaluation(Selection):
    """The last evaluation counts; a finished trial is retrained, for as long as it took.

    A trial takes its first step whatever that costs: it would have no value without one.
    """

    first_step_free = True

    def evaluated(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the latest metrics are with the trial."""
        return {}

    def stops_early(self, step: int) -> bool:
        """Return False."""
        return False

    def value(self, trial: SelectingTrial) -> float | None:
        """Return the latest value."""
        value = trial.metrics.get(trial.metric)
        return None if value is None else float(value)

    def found(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return the hyperparameters as they are."""
        return trial.joint.problem.hyper.state_dict()

    def retrains(self, trial: SelectingTrial) -> bool:
        """Return whether the trial came to its end, and its budget asks for it."""
        return trial.budget.retrain and trial.stop_reason is StopReason.DONE

    def retrain(self, trial: SelectingTrial) -> dict[str, float]:
        """Take as many inner steps as the trial has taken, and return the metrics at their end."""
        problem = trial.rebuild(trial.config, trial.device, trial.seed)
        steps = trial.joint.inner_steps
        made = JointOptimizer(problem, trial.config, seed=trial.seed, total_steps=steps)
        with contextlib.closing(made) as fresh:
            fresh.train_weights(steps)
            return {f"{RETRAINED}{k}": v for k, v in fresh.evaluate("test").items()}

    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what was learned, and the retrained score, of a trial that came to its end."""
        if trial.stop_reason is not StopReason.DONE:
            return {}
        return trial.learned() | (trial.retrain() if self.retrains(trial) else {})

    def totals(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""


Retraining: TypeAlias = Callable[[SelectingTrial], dict[str, float]]
"""Trains with λ frozen as a trial has found it, and returns ``retrained_...``. Picklable."""


class BestEvaluation(Selection):
    """The best evaluation counts, and λ is what it was then (best-checkpoint selection).

    Rows with an evaluation have ``best_value`` and ``best_step`` so far, and ``retrained_...``, the
    score of the best, where it was measured. Without a `Retraining` the score is what the trial
    itself measured at its best: a baseline training is its own retraining. With one, λ is scored by
    it whenever the cost has doubled since the last time, and at the end. Scores are for the report
    alone: they are not charged, and decide nothing.

    A counted budget is never exceeded: a trial that cannot pay its first step takes none.
    """

    first_step_free = False

    def __init__(
        self,
        *,
        patience: int | None = None,
        retraining: Retraining | None = None,
        incumbent: float | None = None,
    ) -> None:
        """Take how it ends and how it is scored.

        Args:
            patience: Steps after the best evaluation after which the trial ends; None: it goes on.
            retraining: How λ is scored.
            incumbent: The best value of the search so far: only what is better is retrained; None:
                there is none.
        """
        if patience is not None:
            require_integer("patience", patience, 1)
        self._patience, self._retraining, self._incumbent = patience, retraining, incumbent
        self._best: dict[str, Any] | None = None  # value, step, and λ in `found` if it is retrained
        self._own_score: dict[str, float] = {}
        self._retrained: dict[str, Any] = {"step": 0, "cost": 0.0}  # the best and when, last time

    def evaluated(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Note the evaluation if it is the best so far, and return the columns of the best."""
        if trial.metric not in row:
            return {}
        measured = {f"{RETRAINED}{k}": v for k, v in row.items() if k.startswith(_MEASURED)}
        value = row[trial.metric]
        if self._best is None or trial.direction.better(value, self._best["value"]):
            found = {} if self._retraining is None else self._snapshot(trial)
            self._best = {"value": value, "step": row["step"], "found": found}
            self._own_score = measured
        known = self.totals() | self._score(trial, row["gradient_equivalents"])
        trial.metrics.update(known)
        return dict.fromkeys(measured) | known

    def stops_early(self, step: int) -> bool:
        """Return whether the best evaluation is `patience` steps old."""
        if self._patience is None or self._best is None:
            return False
        return step - int(self._best["step"]) >= self._patience

    def value(self, trial: SelectingTrial) -> float | None:
        """Return the best value."""
        return None if self._best is None else float(self._best["value"])

    def found(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return the hyperparameters of the best evaluation; a baseline's never change."""
        if self._best is None or self._retraining is None:
            return self._snapshot(trial)
        return dict(self._best["found"])

    def retrains(self, trial: SelectingTrial) -> bool:
        """Return whether the best λ has not been scored yet."""
        return self._due(trial, math.inf)

    def retrain(self, trial: SelectingTrial) -> dict[str, float]:
        """Return the score of the best evaluation, measured again if there is a `Retraining`."""
        return dict(self._own_score) if self._retraining is None else self._retraining(trial)

    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what was learned up to the best evaluation, and its score, however it ended."""
        if self._best is None:
            return {}
        if self._retraining is not None:
            trial.joint.problem.hyper.load_state_dict(self._best["found"])
        return trial.learned() | self._score(trial, math.inf)

    def totals(self) -> dict[str, float]:
        """Return the best value and its step."""
        if self._best is None:
            return {}
        return {"best_value": self._best["value"], "best_step": self._best["step"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the best evaluation and its score."""
        # The names of checkpoint format 2, by which it tells the two ways to score.
        if self._retraining is None:
            return {"best": self._best, "worth": self._own_score}
        return {"best": self._best, "retrained": self._retrained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._best = state["best"]
        if self._retraining is None:
            self._own_score = state["worth"]
        else:
            self._retrained = state["retrained"]

    def _score(self, trial: SelectingTrial, cost: float) -> dict[str, Any]:
        """Return the score of the best evaluation, if it is time to know; infinite cost: the end.

        What an earlier best was scored says nothing about this one, so it goes where this one's
        retraining breaks.
        """
        if self._retraining is None:
            return dict(self._own_score)
        if self._best is None or not self._due(trial, cost):
            return {}
        score: dict[str, Any] = {k: None for k in trial.metrics if k.startswith(RETRAINED)}
        score |= trial.retrain()
        self._retrained = {"step": self._best["step"], "cost": cost}
        return score

    def _due(self, trial: SelectingTrial, cost: float) -> bool:
        return (
            self._retraining is not None
            and self._best is not None
            and self._beats_the_incumbent(trial)
            and self._best["step"] > self._retrained["step"]
            # Costs that double add up to a number of retrainings logarithmic in the budget.
            and cost >= RETRAINING_RATIO * self._retrained["cost"]
        )

    def _beats_the_incumbent(self, trial: SelectingTrial) -> bool:
        best, incumbent = self._best, self._incumbent
        return incumbent is None or (
            best is not None and trial.direction.better(best["value"], incumbent)
        )

    def _snapshot(self, trial: SelectingTrial) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in trial.joint.problem.hyper.state_dict().items()}
