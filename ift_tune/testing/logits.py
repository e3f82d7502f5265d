"""Whether the cross-entropy gets logits."""

from __future__ import annotations

import torch

from ift_tune.hyper.supervised import PROBABILITIES, ClassificationProblem
from ift_tune.problem.batches import Batch
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.symptoms import Finding, Level


def softmax_before_the_loss(problem: BilevelProblem, batch: Batch) -> list[Finding]:
    """Say so where a model ends in a softmax, and its loss has one too; one forward pass."""
    if not isinstance(problem, ClassificationProblem):
        return []
    with torch.no_grad(), evaluating(problem.model):
        if not problem.gets_probabilities(batch):
            return []
    return [Finding("logits", Level.ADVICE, PROBABILITIES)]
