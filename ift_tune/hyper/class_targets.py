"""The targets of classes that kinds read: numbers, or distributions; several labels are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.hyper.answers import one_logit_each, right_probabilities
from ift_tune.hyper.arguments import whole_number
from ift_tune.implicit.vectors import is_stacked


def require_classes(classes: int) -> int:
    """Return the number of classes.

    Raises:
        UsageError: If it is not a whole number of at least 2.
    """
    return whole_number("classes", classes, 2)


def along_classes(values: Tensor, logits: Tensor) -> Tensor:
    """Return values of the classes, shape (classes,) or (), as they broadcast to the logits."""
    return values.reshape(-1, *(1 for _ in logits.shape[2:]))


class ClassTargets:
    """Tells a kind the form of its targets: class numbers, or distributions over the classes.

    Their shape tells. Independent labels have the shape of distributions and sum to anything,
    which only their values show: they are looked at in the first call and wherever λ is
    differentiated, for a look at each inner step would cost.
    """

    def __init__(self, kind: str, classes: int | None = None, *, instead: str) -> None:
        """Remember whose targets they are.

        Args:
            kind: The name of its class, for errors.
            classes: How many there must be; None for any number.
            instead: What to do where there are several labels at once, and the model has one logit
                for each, for errors.
        """
        self._kind, self._classes, self._instead = kind, classes, instead
        self._looked = False

    def require_logits(self, logits: Tensor) -> None:
        """Raise a `UsageError` if logits are not (B, classes, ...)."""
        if self._classes is not None and (logits.ndim < 2 or logits.shape[1] != self._classes):
            raise UsageError(
                f"made for {self._classes} classes, got logits of shape {tuple(logits.shape)}: "
                "give the number of the model's outputs"
            )

    def are_numbers(self, logits: Tensor, targets: Tensor, raw: Tensor) -> bool:
        """Return whether targets are class numbers (B, ...), not distributions (B, classes, ...).

        Args:
            logits: Shape (B, classes, ...).
            targets: Either form.
            raw: λ of the kind.

        Raises:
            UsageError: If they are neither, or of other classes.
        """
        self.require_logits(logits)
        if not targets.is_floating_point() and targets.shape == logits.shape[:1] + logits.shape[2:]:
            return True
        if not targets.is_floating_point() or targets.shape != logits.shape:
            raise UsageError(
                "targets must be class numbers, whole and of shape (B, ...), or probabilities of "
                f"the logits' shape {tuple(logits.shape)}; got {targets.dtype}, "
                f"{tuple(targets.shape)}"
            )
        if (raw.requires_grad or not self._looked) and not is_stacked(targets):
            self._looked = True
            self._refuse_labels(targets.detach())
        return False

    def probabilities(self, logits: Tensor, targets: Tensor, raw: Tensor) -> Tensor:
        """Return targets as probabilities of the logits' shape (B, classes, ...).

        Args:
            logits: Shape (B, classes, ...).
            targets: Class numbers from 0, shape (B, ...), or distributions already.
            raw: λ of the kind.

        Raises:
            UsageError: If they are neither, or of other classes.
        """
        if not self.are_numbers(logits, targets, raw):
            return targets
        return torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1.0)

    def _refuse_labels(self, targets: Tensor) -> None:
        right, _ = right_probabilities(targets)
        if bool(right.all()):
            return
        sums = targets.sum(dim=1)
        raise UsageError(
            f"{self._kind} must have targets that are class numbers, or probabilities that sum to "
            f"1 over dimension 1: for several labels at once, {one_logit_each(targets.shape[1])} "
            f"of a ClassificationProblem, where {self._instead}; got sums of "
            f"{float(sums.min()):.3g} to {float(sums.max()):.3g}"
        )
