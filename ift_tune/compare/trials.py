"""IFT's trial in a comparison: its best hyperparameters are retrained from scratch."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from ift_tune.base.errors import NonFiniteError
from ift_tune.compare.plain import BaselineTrial, baseline_budget
from ift_tune.compare.scored import RETRAINED, ScoredTrial
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.trial import OUT_OF_MEMORY, ProblemFactory

RETRAINING_RATIO = 2.0  # of costs between two retrainings on the way


class SelectedTrial(ScoredTrial):
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
        incumbent: float = math.inf,
        seed: int = 0,
        device: str | torch.device = "auto",
        metric: str | None = None,
    ) -> None:
        """Describe the trial; see `ScoredTrial`.

        Args:
            problem_factory: See `Trial`.
            config: See `Trial`.
            budget: See `ScoredTrial`.
            training_steps: Inner steps of a retraining.
            incumbent: The best value of the search so far: only what is better is retrained.
            seed: See `Trial`.
            device: See `Trial`.
            metric: See `Trial`.
        """
        super().__init__(
            problem_factory,
            config,
            budget,
            training_steps=training_steps,
            seed=seed,
            device=device,
            metric=metric,
        )
        self._incumbent = incumbent
        self._retrained: dict[str, Any] = {"step": 0, "cost": 0.0}

    @property
    def retrains(self) -> bool:
        """Whether `finish` will train again."""
        return self._due(math.inf)

    def found(self) -> dict[str, Any]:
        """Return the hyperparameters of the best moment."""
        return self._snapshot() if self._best is None else dict(self._best["found"])

    def retrain(self) -> dict[str, float]:
        """Train from scratch with the best hyperparameters frozen, and the same early stopping.

        Returns:
            The metrics of both splits at the best evaluation, as ``retrained_test_error``, ...;
            none if it is not finite or out of memory.
        """
        found = self.found()

        def prepare(problem: BilevelProblem) -> None:
            problem.hyper.load_state_dict(found)

        training = BaselineTrial(
            self._factory,
            self.config,
            baseline_budget(self._training_steps),
            training_steps=self._training_steps,
            prepare=prepare,
            seed=self.seed,
            device=self.device,
            metric=self._metric,
        )
        training.setup()
        while training.stop_reason is None:
            training.step()
        return training.worth

    def _snapshot(self) -> dict[str, Any]:
        return {k: v.clone() for k, v in super().found().items()}

    def _due(self, cost: float) -> bool:
        """Return whether the best moment is to be retrained now."""
        return (
            self._best is not None
            and self._best["value"] < self._incumbent
            and self._best["step"] > self._retrained["step"]
            and cost >= RETRAINING_RATIO * self._retrained["cost"]
        )

    def _worth(self, cost: float) -> dict[str, float]:
        if not self._due(cost) or self._best is None:
            return {}
        found: dict[str, Any] = {k: None for k in self.metrics if k.startswith(RETRAINED)}
        with contextlib.suppress(NonFiniteError, *OUT_OF_MEMORY):
            found |= self.retrain()
        self._retrained = {"step": self._best["step"], "cost": cost}
        return found

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"retrained": self._retrained}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._retrained = state["retrained"]
