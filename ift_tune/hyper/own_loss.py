"""What a model's own loss is the mean loss of: its predictions in one of the forms they come in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError

SUCCESSORS = "successors"
"""Each token predicts the target of the next one, as language models have it."""


def forms_of(outputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return predictions and targets in each form that a loss may take them in.

    Transformers have the classes of each token in the last dimension, and one column for a number.

    Example:
        >>> list(forms_of(torch.zeros(2, 5, 7), torch.zeros(2, 5).long()))
        ['as they are', 'classes last', 'successors']
    """
    forms = {"as they are": (outputs, targets)}
    if outputs.ndim >= 3:
        forms["classes last"] = outputs.movedim(-1, 1), targets
    if outputs.ndim > 1 and outputs.shape[-1] == 1:
        forms["one column"] = outputs.squeeze(-1), targets
    if outputs.ndim == 3 and targets.shape == outputs.shape[:2]:
        forms[SUCCESSORS] = outputs[:, :-1].movedim(-1, 1), targets[:, 1:]
    return forms


def explaining(
    outputs: Tensor,
    own: Tensor,
    targets: Tensor,
    mean_loss: Callable[[Tensor, Tensor], Tensor],
) -> list[str]:
    """Return the forms whose mean loss is the model's own, in value and by its predictions.

    Values alone do not tell: before any training, all forms have the loss of a guess. Gradients by
    the predictions do, also where all classes are predicted alike.

    Args:
        outputs: What the model predicts.
        own: Its loss, with the graph from the predictions on. Of one without, as a compiled
            model's is, values decide.
        targets: Those of the batch.
        mean_loss: Returns the mean loss of predictions and targets in a form; raises a
            `UsageError` if they cannot be in it.
    """
    slope = _by_outputs(own, outputs)
    names = []
    for name, form in forms_of(outputs, targets).items():
        with contextlib.suppress(UsageError):
            mean = mean_loss(*form)
            right = are_near(mean, own, outputs.dtype)
            if right and slope is not None and (other := _by_outputs(mean, outputs)) is not None:
                off = float((other - slope).norm())
                right = off <= _rounding(outputs.dtype) * float(slope.norm())
            if right:
                names.append(name)
    return names


def are_near(mean: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two losses of predictions of a type are the same but for rounding."""
    one, other = float(mean.detach()), float(own.detach())
    return abs(one - other) <= _rounding(dtype) * max(1.0, abs(one))


def _rounding(dtype: torch.dtype) -> float:
    return 1e-4 + 4.0 * torch.finfo(dtype).eps


def _by_outputs(loss: Tensor, outputs: Tensor) -> Tensor | None:
    if not (loss.requires_grad and outputs.requires_grad):
        return None
    (slope,) = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    return slope
