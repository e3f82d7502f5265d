"""The orders that an audit makes by itself: by the weights, and by two models' losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ift_tune.studies.audit_findings import Flags, Ranking
from ift_tune.studies.judging import Judgement


@dataclass(frozen=True)
class SeedResult:
    """What a run of one seed says.

    Attributes:
        seed: Which.
        weights: Of the examples.
        judgement: Of the model trained from scratch with them; None of a problem of one's own.
        changes: Of the search loss, if an example was left out.
        solve: How that was found.
        cost: Of the run, in gradient-equivalents.
        refit_cost: Of the training that the judgement is of. What leaving out an example changes
            ranks nothing, and what it has cost is in neither.
    """

    seed: int
    weights: torch.Tensor
    judgement: Judgement | None
    changes: torch.Tensor
    solve: dict[str, Any]
    cost: float
    refit_cost: float


def of_the_weights(found: Sequence[SeedResult], initial: torch.Tensor) -> list[Ranking]:
    """Return the audit's own ranking and that of the weights alone, the mean over seeds of both."""
    cost = sum(each.cost for each in found)
    weights = torch.stack([each.weights for each in found]).mean(dim=0)
    low = (weights < 0.5 * initial).numpy()
    alone = Ranking(
        "weights",
        "the smallest weights first; flagged: less than half of what it began with",
        -weights.numpy(),
        low,
        cost,
    )
    judgement = together(found)
    if judgement is None:
        return [alone]
    flags = None if judgement.probabilities is None else _disagrees(judgement)
    words = (
        "by the loss of the given label under the model trained from scratch with the weights, and "
        "on the validation examples; flagged: another label is likelier"
    )
    cost += sum(each.refit_cost for each in found)
    return [Ranking("audit", words, judgement.losses.numpy(), flags, cost), alone]


def of_the_loss(name: str, training: str, plain: Judgement, cost: float) -> Ranking:
    """Return the order of the loss under a training, which has cost so much."""
    flags = None if plain.probabilities is None else _disagrees(plain)
    words = (
        f"by the loss of the given label under {training}, stopped early by the search split; "
        "flagged: another label is likelier"
    )
    return Ranking(name, words, plain.losses.numpy(), flags, cost)


def together(found: Sequence[SeedResult]) -> Judgement | None:
    """Return what the refitted models of all seeds say together; None if none says anything."""
    judgements = [each.judgement for each in found if each.judgement is not None]
    return Judgement.mean(judgements) if judgements else None


def _disagrees(judgement: Judgement) -> Flags:
    known = judgement.given.isfinite() & judgement.predicted.isfinite()
    return (known & (judgement.given != judgement.predicted)).numpy()
