"""The orders that an audit makes by itself: by the weights, and by the losses of models.

A single model's loss is a noisy order: it has memorised some wrong labels, and finds some right
ones hard. Models that have been trained on different data err on different examples, and together
find more (Brodley and Friedl 1999, "Identifying mislabeled training data"). An audit trains three
in any case, two of them to be held against: its own order is by what they say together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ift_tune.studies.audit_findings import Flags, Ranking
from ift_tune.studies.judging import Judgement

TRAININGS = {
    "refit": "trained from scratch with the weights, and on the validation examples",
    "loss": "trained plainly",
    "val": "trained on the validation examples alone",
}
"""The models that judge, all stopped early by the search split: how each was trained."""

_OTHERS = ("loss", "val")


class Judged(NamedTuple):
    """What a model says of the examples, and what its training has cost."""

    judgement: Judgement
    cost: float


@dataclass(frozen=True)
class SeedResult:
    """What a run of one seed says.

    Attributes:
        seed: Which.
        weights: Of the examples.
        models: What each of `TRAININGS` says; none of a problem of one's own.
        changes: Of the search loss, if an example was left out.
        solve: How that was found.
        cost: Of the run, in gradient-equivalents. What leaving out an example changes ranks
            nothing, and what it has cost is not in it.
    """

    seed: int
    weights: torch.Tensor
    models: Mapping[str, Judged]
    changes: torch.Tensor
    solve: dict[str, Any]
    cost: float


def rankings(found: Sequence[SeedResult], initial: torch.Tensor) -> list[Ranking]:
    """Return all of them, the audit's own first, each by the means over seeds.

    Args:
        found: Of each seed.
        initial: The weights before they were learned.
    """
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
    if not found[0].models:
        return [alone]
    paid = {name: sum(each.models[name].cost for each in found) for name in TRAININGS}
    paid["refit"] += cost
    single = [
        _of_the_loss(name, f"a model {how}", judgement_by(found, name), paid[name])
        for name, how in TRAININGS.items()
    ]
    return [
        _of_the_loss(
            "audit", f"{', '.join(TRAININGS)} together", judgement_by(found), sum(paid.values())
        ),
        single[0],
        alone,
        *single[1:],
        _of_the_loss(
            "+".join(_OTHERS),
            f"{', '.join(_OTHERS)} together, no weights in it",
            judgement_by(found, *_OTHERS),
            sum(paid[name] for name in _OTHERS),
        ),
    ]


def judgement_by(found: Sequence[SeedResult], *names: str) -> Judgement:
    """Return what models of all seeds say together, by default all of `TRAININGS`."""
    return Judgement.mean(
        each.models[name].judgement for name in names or TRAININGS for each in found
    )


def _of_the_loss(name: str, model: str, judgement: Judgement, cost: float) -> Ranking:
    flags: Flags | None = None
    if judgement.probabilities is not None:
        known = judgement.given.isfinite() & judgement.predicted.isfinite()
        flags = (known & (judgement.given != judgement.predicted)).numpy()
    words = f"by the loss of the given label under {model}; flagged: another label is likelier"
    return Ranking(name, words, judgement.losses.numpy(), flags, cost)
