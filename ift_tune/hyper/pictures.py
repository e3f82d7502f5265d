"""What is shown of many hyperparameters: numbers, histograms, maps; and inputs seen as images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.base.views import HeatMap, Histogram, View

Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width."""
Item = TypeVar("Item")

_MOST_LAYERS = 8
_MOST_VALUES = 1024  # in one group of a histogram
_SIDE = 64


def on_images(
    function: Callable[[Tensor], Tensor], inputs: Tensor, shape: Shape | None, who: str
) -> Tensor:
    """Apply a function of images, (B, C, H, W) to the same shape, to images or to rows of pixels.

    Args:
        function: What to apply.
        inputs: Images (B, C, H, W); or rows (B, C·H·W), which come back as rows.
        shape: What the rows are; None if the inputs are images.
        who: For errors.

    Raises:
        UsageError: If the inputs are neither, or no floating-point numbers.
    """
    require_one_input(inputs, who)
    if not inputs.is_floating_point():
        raise UsageError(f"{who} needs images of floating-point numbers, got {inputs.dtype}")
    if inputs.ndim == 4:
        return function(inputs)
    if shape is None:
        raise UsageError(
            f"{who} needs images of shape (B, C, H, W), got {tuple(inputs.shape)}: for rows of "
            "pixels, say what they are by shape=(channels, height, width)"
        )
    if inputs.ndim != 2 or inputs.shape[1] != shape[0] * shape[1] * shape[2]:
        raise UsageError(
            f"{who} was told that rows are images of shape {shape}, and got inputs of shape "
            f"{tuple(inputs.shape)}"
        )
    return function(inputs.reshape(-1, *shape)).flatten(1)


def require_one_input(inputs: object, who: str) -> None:
    """Raise a `UsageError` unless a batch's inputs are one tensor, which a kind can change."""
    if not isinstance(inputs, Tensor):
        names = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else "several"
        raise UsageError(
            f"{who} must be given inputs that are one tensor: let the loader yield (inputs, "
            f"targets), got a {type(inputs).__name__} of {names}"
        )


def quantiles(values: Tensor) -> dict[str, float]:
    """Return minimum, median, mean and maximum of a tensor."""
    flat = values.detach().flatten()
    return {
        "min": float(flat.min()),
        "median": float(flat.median()),
        "mean": float(flat.mean()),
        "max": float(flat.max()),
    }


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
    shown = evenly(layers, _MOST_LAYERS)
    groups = {name: sample(values[name]) for name in shown}
    return [
        Histogram(f"{title} by layer", groups, title, log=True),
        *(
            heat_map(f"{title} of {name}", values[name], "output", "input", log=True)
            for name in shown
            if values[name].ndim >= 2 and values[name][0].numel() > 1
        ),
    ]


def sample(values: Tensor) -> Tensor:
    """Return at most a thousand numbers distributed as `values`: evenly spaced quantiles."""
    flat = values.detach().flatten().cpu()
    if flat.numel() <= _MOST_VALUES:
        return flat.clone()
    # Not a random choice: the extremes are kept, and nobody's random numbers are touched.
    places = torch.linspace(0, flat.numel() - 1, _MOST_VALUES, dtype=torch.float64).round().long()
    return flat.sort().values[places]


def heat_map(title: str, values: Tensor, rows: str, columns: str, *, log: bool = False) -> HeatMap:
    """Return a map of at most 64×64 cells: filters as (out, in) by their means.

    Args:
        title: What the numbers are.
        values: Shape (rows, columns, ...); of a larger matrix, the cells are means over blocks.
        rows: What a row is.
        columns: What a column is.
        log: Whether colours go by factors.
    """
    matrix = values.detach().flatten(2).mean(dim=2) if values.ndim > 2 else values.detach()
    cells = (min(matrix.shape[0], _SIDE), min(matrix.shape[1], _SIDE))
    means = F.adaptive_avg_pool2d(matrix[None], cells)[0].cpu()
    return HeatMap(title, means, rows, columns, log, tuple(matrix.shape))


def evenly(of: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many, evenly from the first to the last."""
    if len(of) <= most:
        return list(of)
    step = (len(of) - 1) / (most - 1)
    return [of[round(i * step)] for i in range(most)]
