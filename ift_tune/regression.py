"""The ready-made problem for regression: mean squared error, any kind of hyperparameter."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.errors import UsageError
from ift_tune.hyper import HyperKind
from ift_tune.penalty import Penalty
from ift_tune.problem import BilevelProblem, Splits
from ift_tune.types import Batch
from ift_tune.views import View

_SQUARED = partial(F.mse_loss, reduction="none")


class RegressionProblem(BilevelProblem):
    """Mean squared error on batches ``(inputs, targets)`` or ``(inputs, targets, index)``.

    An example may have many targets: then its loss is their mean. The hyperparameters act on the
    training loss alone: the validation loss is the plain mean and sees λ only through the weights.
    """

    hyper: HyperKind

    def __init__(self, model: nn.Module, hyper: HyperKind, splits: Splits) -> None:
        """Take the parts.

        Args:
            model: Maps inputs to predictions of the targets' shape, (B, ...).
            hyper: A kind of hyperparameters, or a `Compose` of several.
            splits: Loaders of batches as above; targets are real numbers, shape (B, ...).

        Raises:
            UsageError: If `hyper` is not a `HyperKind`.
        """
        if not isinstance(hyper, HyperKind):
            raise UsageError(
                f"hyper must be a kind of hyperparameters such as WeightDecay, got "
                f"{type(hyper).__name__}; for a module of your own, subclass BilevelProblem"
            )
        self.model, self.hyper, self.splits = model, hyper, splits

    def train_loss(self, batch: Batch) -> Tensor:
        """Return the mean of the examples' losses, with the hyperparameters at work.

        Raises:
            UsageError: If predictions and targets differ in shape.
        """
        inputs, targets, *rest = batch
        index = rest[0] if rest else None
        with self.hyper.applied():
            predictions = self.model(self.hyper.inputs(inputs, index))
        _require_equal(predictions, targets)
        losses = self.hyper.criterion(_SQUARED)(predictions, targets)
        if losses.ndim > 1:
            losses = losses.flatten(1).mean(dim=1)
        return self.hyper.weigh(losses, index).mean()

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the mean squared error.

        Raises:
            UsageError: If predictions and targets differ in shape.
        """
        predictions = self.model(batch[0])
        _require_equal(predictions, batch[1])
        return F.mse_loss(predictions, batch[1])

    def penalty(self) -> Penalty | None:
        """Return the hyperparameters' penalty."""
        return self.hyper.penalty()

    def summary(self) -> dict[str, float]:
        """Return the hyperparameters' summary."""
        return self.hyper.summary()

    def views(self) -> list[View]:
        """Return the hyperparameters' pictures."""
        return self.hyper.views()


def _require_equal(predictions: Tensor, targets: Tensor) -> None:
    """Refuse what broadcasting would turn into a table of all pairs."""
    if predictions.shape != targets.shape:
        raise UsageError(
            f"the model predicts shape {tuple(predictions.shape)} and the targets have shape "
            f"{tuple(targets.shape)}: end the model with nn.Flatten(0), or give targets a column"
        )
