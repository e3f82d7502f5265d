"""Problems of any size for the cost study: what they learn does not matter, what they cost does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import Splits

WIDTHS = (8, 32, 128, 512)


_PIXELS, _CLASSES, _EXAMPLES = 64, 10, 200


def sized_problem(
    width: int, per: Literal["model", "weight"], device: torch.device, seed: int = 0
) -> ClassificationProblem:
    """Return an MLP 64-width-width-10 on random data, with one decay or one for every weight.

    All batches are whole, so that inner and outer steps look at equally many examples.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(_EXAMPLES, _PIXELS, generator=generator).to(device)
    targets = torch.randint(_CLASSES, (_EXAMPLES,), generator=generator).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(_PIXELS, width),
            nn.ELU(),
            nn.Linear(width, width),
            nn.ELU(),
            nn.Linear(width, _CLASSES),
        ).to(device)
    whole = Batches(inputs, targets)
    splits = Splits(whole, whole, whole, whole)
    return ClassificationProblem(model, WeightDecay(model, per), splits)
