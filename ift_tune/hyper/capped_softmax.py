"""A softmax no entry of which gets beyond a bound of its own."""

from __future__ import annotations

import torch
from torch import Tensor

_GRID, _ROUNDS = 64, 3  # points of a grid, and how often it is drawn around the solution anew
_NEWTON = 6  # steps from there, which is nearer than 1 for logits up to 10⁵
_POLISH = 3  # steps more that may leave the grid


def capped_softmax(logits: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return a_d·sigmoid(λ_d − log a_d + t), with t such that they sum to `total`.

    Where all a are far away this is total·softmax(λ). The derivatives by λ are those of the
    solution, up to the third; the values stay below a, and sum to `total` however far apart the
    logits are.

    Args:
        logits: λ, shape (entries,).
        most: a, what each entry stays below; the sum is above `total`.
        total: Above 0.

    Example:
        >>> import torch
        >>> from ift_tune.hyper.capped_softmax import capped_softmax
        >>> most = torch.tensor([0.5, 0.4, 0.8])
        >>> found = capped_softmax(torch.tensor([90.0, 0.0, -90.0]), most, torch.tensor(1.0))
        >>> [round(value, 3) for value in found.tolist()]
        [0.5, 0.4, 0.1]
    """
    logits = logits - most.log()
    with torch.no_grad():
        shift = _solved(logits, most, total)
    # A step of Newton's method along which no value changes has the first derivative of the
    # solution, a second one the next two.
    for _ in range(2):
        shares = torch.sigmoid(logits + shift)
        found, slope = (most * shares).sum(), (most * shares * (1.0 - shares)).sum()
        shift = shift - (found - found.detach()) / _positive(slope)
    return most * torch.sigmoid(logits + shift)


def _solved(logits: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return t, within rounding: by ever finer grids around it, then by Newton's method."""
    # If all logits were the largest or the least of them, t would be one of the ends.
    level = torch.log(total / (most.sum() - total))
    low, high = level - logits.max(), level - logits.min()
    steps = torch.linspace(0.0, 1.0, _GRID, dtype=logits.dtype, device=logits.device)
    for _ in range(_ROUNDS):
        grid = low + (high - low) * steps
        below = (torch.sigmoid(logits + grid.unsqueeze(1)) * most).sum(dim=1) <= total
        low, high = torch.where(below, grid, low).max(), torch.where(below, high, grid).min()
    shift = (low + high) / 2.0
    for _ in range(_NEWTON):
        shift = shift + _correction(shift, logits, most, total)
        shift = torch.minimum(torch.maximum(shift, low), high)
    # The check at the start holds every choice between numbers as it was, so that a loss stays on
    # its side of a kink: where λ has been moved, an end that is chosen once more is not quite t.
    for _ in range(_POLISH):
        shift = shift + _correction(shift, logits, most, total).clamp(-1.0, 1.0)
    return shift


def _correction(shift: Tensor, logits: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return the step of Newton's method."""
    shares = torch.sigmoid(logits + shift)
    slope = (most * shares * (1.0 - shares)).sum()
    return (total - (most * shares).sum()) / _positive(slope)


def _positive(slope: Tensor) -> Tensor:
    """Return a slope to divide by: where every entry is at 0 or at its bound, it vanishes."""
    return slope.clamp(min=torch.finfo(slope.dtype).tiny)
