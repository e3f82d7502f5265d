"""Where weights meet losses: what a kind makes of losses must be losses of the same answers.

PyTorch broadcasts (B,) against (B, 1), or against (B, classes) where there are as many classes as
examples, to numbers that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from ift_tune.base.errors import UsageError

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``criterion(logits, targets)``: the loss of each example, as `F.cross_entropy` gives it without
reduction. Logits have shape (B, classes, ...); targets are class numbers (B, ...), or
probabilities of the logits' shape. The losses have shape (B, ...)."""


def times(losses: Tensor, weights: Tensor, kind: object) -> Tensor:
    """Return losses, each multiplied by its weight.

    Raises:
        UsageError: If there is not one weight for each loss; the kind is named.
    """
    if weights.shape != losses.shape:
        raise UsageError(
            f"{type(kind).__name__} has weights of shape {tuple(weights.shape)} for the losses: "
            "let the loss have an entry for each of these, without reduction, got losses of shape "
            f"{tuple(losses.shape)}"
        )
    return losses * weights


def require_as_many(found: Tensor, losses: Tensor, kind: object) -> Tensor:
    """Return what a kind's `weigh` has made of losses, one for each of them.

    Raises:
        UsageError: If it has another shape; the kind is named.
    """
    if found.shape != losses.shape:
        raise UsageError(
            f"weigh of {type(kind).__name__} must return a loss for each that it gets, shape "
            f"{tuple(losses.shape)}: multiply the losses by weights of their own shape, got "
            f"{tuple(found.shape)}"
        )
    return found


def made_criterion(
    loss: Criterion, kind: object, make: Callable[[Criterion], Criterion]
) -> Criterion:
    """Return the criterion that a kind makes from a loss, with a look at the shapes.

    It may leave dimensions out, as a mean over an example's answers does, and make none.

    Args:
        loss: To be wrapped.
        kind: To be named.
        make: Its `criterion`.

    Returns:
        A criterion that raises a `UsageError` where it has more losses than the wrapped one.
    """
    inner = None

    def noted(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal inner
        losses = loss(logits, targets)
        inner = losses.shape
        return losses

    made = make(noted)
    if made is noted:
        return loss

    def looked_at(logits: Tensor, targets: Tensor) -> Tensor:
        losses = made(logits, targets)
        if inner is not None and losses.shape != inner[: losses.ndim]:
            raise UsageError(
                f"criterion of {type(kind).__name__} must return a loss for each that it wraps, "
                f"shape {tuple(inner)}: multiply the losses by weights of their own shape, got "
                f"{tuple(losses.shape)}"
            )
        return losses

    return looked_at
