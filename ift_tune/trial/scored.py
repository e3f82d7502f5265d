"""The best evaluation with a score at each cost: for comparisons, whose curves show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ift_tune.trial.found import state_of
from ift_tune.trial.selection import (
    RETRAINED,
    SCORES,
    SelectingTrial,
    Selection,
)
from ift_tune.trial.training import BaselineTraining

RETRAINING_RATIO = 2.0  # of costs between two retrainings on the way

Retraining: TypeAlias = Callable[[SelectingTrial], dict[str, float]]
"""Trains with λ frozen as a trial has found it, and returns ``retrained_...``. Picklable.

Where it has a method `training`, this returns the training that it takes, and its patience, for
whoever computes a part of several trials' at once.
"""


class BestEvaluation(Selection):
    """The best evaluation counts, and λ is what it was then (best-checkpoint selection).

    Rows have ``retrained_...`` too, the score of the best, where it was measured. Without a
    `Retraining` the score is what the trial itself measured at its best: a baseline training is its
    own retraining. With one, λ is scored by it whenever the cost has doubled since the last time,
    and at the end. Scores are for the report alone: they are not charged, and decide nothing.

    A counted budget is never exceeded: a trial that cannot pay its first step takes none.
    """

    first_step_free = False

    def __init__(
        self,
        *,
        patience: int | None = None,
        retraining: Retraining | None = None,
        incumbent: float | None = None,
        keep_model: bool = False,
    ) -> None:
        """Take how it ends and how it is scored.

        Args:
            patience: Steps after the best evaluation after which the trial ends; None: it goes on.
            retraining: How λ is scored.
            incumbent: The best value of the search so far: only what is better is retrained; None:
                there is none.
            keep_model: Whether the model of the best evaluation is kept, for trials that build on
                it; of a trial too that has broken off.
        """
        super().__init__(patience)
        self._retraining, self._incumbent = retraining, incumbent
        self._keep_model = self.keeps_broken = keep_model
        self._own_score: dict[str, float] = {}
        self._retrained: dict[str, Any] = {"step": 0, "cost": 0.0}  # the best and when, last time

    def remember(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return λ, if it is going to be retrained, and note the trial's own score."""
        self._own_score, problem = _as_scores(row), trial.joint.problem
        kept = {"model": state_of(problem.model)} if self._keep_model else {}
        return kept | {"found": {} if self._retraining is None else state_of(problem.hyper)}

    def columns(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of the best, and its score where it is known."""
        known = self.best_columns() | self._score(trial, row["gradient_equivalents"])
        trial.metrics.update(known)
        return dict.fromkeys(_as_scores(row)) | known

    def found(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return the hyperparameters of the best evaluation; a baseline's never change."""
        if self._best is None or self._retraining is None:
            return state_of(trial.joint.problem.hyper)
        return dict(self._best["found"])

    def model(self) -> dict[str, Any] | None:
        """Return the model's state at the best evaluation, if it is kept."""
        return None if self._best is None else self._best.get("model")

    def retrains(self, trial: SelectingTrial) -> bool:
        """Return whether the best λ has not been scored yet."""
        return self._due(trial, math.inf)

    def retraining(
        self, trial: SelectingTrial, row: Mapping[str, Any] | None = None
    ) -> tuple[BaselineTraining, int | None] | None:
        """Return the training that scores the best evaluation, if it is time to know."""
        plan = getattr(self._retraining, "training", None)
        cost = math.inf if row is None else row["gradient_equivalents"]
        return plan() if callable(plan) and self._due(trial, cost) else None

    def retrain(self, trial: SelectingTrial) -> dict[str, float]:
        """Return the score of the best evaluation, measured again if there is a `Retraining`."""
        return dict(self._own_score) if self._retraining is None else self._retraining(trial)

    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what was learned up to the best evaluation, and its score, however it ended."""
        return {} if self._best is None else trial.learned() | self._score(trial, math.inf)

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


def _as_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{RETRAINED}{k}": v for k, v in row.items() if k.startswith(SCORES)}
