"""Baseline trainings with early stopping: the trials of black-box searches, and retrainings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.trial.selection import RETRAINED, BestEvaluation, SelectingTrial
from ift_tune.trial.training import BaselineTraining
from ift_tune.trial.trial import ProblemFactory, Trial

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
    """
    return Trial(
        problem_factory,
        config,
        training.length if budget is None else budget,
        seed=seed,
        device=device,
        metric=metric,
        training=training,
        selection=BestEvaluation(patience=EARLY_STOPPING_PATIENCE),
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
        training = baseline_trial(
            trial.rebuild,
            trial.config,
            BaselineTraining(self.steps),
            seed=trial.seed,
            device=trial.device,
            metric=trial.metric,
        )
        training.setup()
        while training.stop_reason is None:
            training.step()
        return {k: v for k, v in training.metrics.items() if k.startswith(RETRAINED)}
