"""A trial whose result is its best evaluation on the search split, not its last."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch

from ift_tune.base.status import StopReason
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.trial.trial import ProblemFactory, Trial

MEASURED = ("search_", "test_")
RETRAINED = "retrained_"


class ScoredTrial(Trial, abc.ABC):
    """A trial that is scored by its best moment, and knows what that is worth.

    Its rows have ``best_value`` and ``best_step`` so far where the search split was evaluated, and
    ``retrained_...`` where the worth of the best moment was measured.
    """

    def __init__(
        self,
        problem_factory: ProblemFactory,
        config: MetaConfig,
        budget: Budget,
        *,
        training_steps: int,
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
            seed: See `Trial`.
            device: See `Trial`.
            metric: See `Trial`.
        """
        super().__init__(problem_factory, config, budget, seed=seed, device=device, metric=metric)
        self._training_steps = training_steps
        self._best: dict[str, Any] | None = None

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
        return row | {f"{RETRAINED}{k}": None for k in row if k.startswith(MEASURED)} | new

    def finish(self) -> dict[str, Any]:
        """Return what was learned, and what it is worth, at the best moment."""
        if self._best is None:
            return {}
        if self._best["found"]:
            self.joint.problem.hyper.load_state_dict(self._best["found"])
        return self.learned() | self._worth(math.inf)

    def totals(self) -> dict[str, float]:
        """Return the costs, and the best value with its step."""
        return super().totals() | self._best_so_far()

    @abc.abstractmethod
    def _worth(self, cost: float) -> dict[str, float]:
        """Return what the best moment is worth as ``retrained_...``, if it is time to know.

        Args:
            cost: What the trial has spent; infinite at its end.
        """

    @abc.abstractmethod
    def _snapshot(self) -> dict[str, Any]:
        """Return copies of the hyperparameters as they are, where they are not in the tables."""

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

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"best": self._best}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._best = state["best"]
