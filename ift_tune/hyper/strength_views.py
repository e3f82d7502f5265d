"""Pictures of a number for each weight: distributions by layer, and maps of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.views import HeatMap, Histogram, View

_MOST_LAYERS = 8
_MOST_VALUES = 1024  # in one group of a histogram
_SIDE = 64


def strength_views(title: str, values: Mapping[str, Tensor]) -> list[View]:
    """Return a histogram with a group for each layer, and a map of each matrix and filter bank.

    Of many layers, a few are shown, evenly from the first to the last.

    Args:
        title: What the numbers are; they are positive.
        values: The numbers of each parameter tensor by its name. Where each tensor has but one,
            they make a single group and no map.
    """
    if all(value.numel() == 1 for value in values.values()):
        together = torch.stack([value.reshape(()) for value in values.values()])
        return [Histogram(f"{title} of the tensors", {"all": sample(together)}, title, log=True)]
    layers = [name for name, value in values.items() if value.ndim >= 2] or list(values)
    shown = _evenly(layers)
    groups = {name: sample(values[name]) for name in shown}
    return [
        Histogram(f"{title} by layer", groups, title, log=True),
        *(
            HeatMap(f"{title} of {name}", shrunk(values[name]), "output", "input", log=True)
            for name in shown
            if values[name].ndim >= 2 and values[name][0].numel() > 1
        ),
    ]


def sample(values: Tensor) -> Tensor:
    """Return at most a thousand numbers distributed as `values`: evenly spaced quantiles."""
    flat = values.detach().flatten().cpu()
    if flat.numel() <= _MOST_VALUES:
        return flat.clone()
    places = torch.linspace(0, flat.numel() - 1, _MOST_VALUES, dtype=torch.float64).round().long()
    return flat.sort().values[places]


def shrunk(values: Tensor) -> Tensor:
    """Return a matrix of at most 64×64: filters as (out, in) by their means, large ones blurred."""
    matrix = values.detach().flatten(2).mean(dim=2) if values.ndim > 2 else values.detach()
    rows, columns = (min(side, _SIDE) for side in matrix.shape)
    return F.adaptive_avg_pool2d(matrix[None], (rows, columns))[0].cpu()


def _evenly(names: list[str]) -> list[str]:
    if len(names) <= _MOST_LAYERS:
        return names
    step = (len(names) - 1) / (_MOST_LAYERS - 1)
    return [names[round(i * step)] for i in range(_MOST_LAYERS)]
