"""The two forms of a classifier's targets: class numbers, and probabilities of the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError


def require_classes(classes: int) -> int:
    """Return the number of classes.

    Raises:
        UsageError: If it is not a whole number of at least 2.
    """
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise UsageError(f"classes must be a whole number of at least 2, got {classes!r}")
    return classes


def are_numbers(logits: Tensor, targets: Tensor, classes: int | None = None) -> bool:
    """Return whether targets are class numbers (B, ...), not probabilities (B, classes, ...).

    Args:
        logits: Shape (B, classes, ...).
        targets: Either form.
        classes: How many there must be; None for any number.

    Raises:
        UsageError: If they are neither, or of other classes.
    """
    if classes is not None and (logits.ndim < 2 or logits.shape[1] != classes):
        raise UsageError(
            f"made for {classes} classes, got logits of shape {tuple(logits.shape)}: give the "
            "number of the model's outputs"
        )
    if not targets.is_floating_point() and targets.shape == logits.shape[:1] + logits.shape[2:]:
        return True
    if targets.is_floating_point() and targets.shape == logits.shape:
        return False
    raise UsageError(
        f"targets must be class numbers, whole and of shape (B, ...), or probabilities of the "
        f"logits' shape {tuple(logits.shape)}; got {targets.dtype}, {tuple(targets.shape)}"
    )


def probabilities(logits: Tensor, targets: Tensor, classes: int | None = None) -> Tensor:
    """Return targets as probabilities of the logits' shape (B, classes, ...).

    Args:
        logits: Shape (B, classes, ...).
        targets: Class numbers from 0, shape (B, ...), or probabilities already.
        classes: How many there must be; None for any number.

    Raises:
        UsageError: If the shapes do not agree.
    """
    if not are_numbers(logits, targets, classes):
        return targets
    return torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1.0)


def along_classes(values: Tensor, logits: Tensor) -> Tensor:
    """Return values of the classes, shape (classes,) or (), as they broadcast to the logits."""
    return values.reshape(-1, *(1 for _ in logits.shape[2:]))
