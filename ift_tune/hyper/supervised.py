"""The ready-made problems: classification and regression with any kind of hyperparameters."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.base.views import View
from ift_tune.hyper import HyperKind
from ift_tune.implicit.penalty import Penalty
from ift_tune.problem.batches import Batch
from ift_tune.problem.problem import BilevelProblem, Splits

_CROSS_ENTROPY = partial(F.cross_entropy, reduction="none")


class ClassificationProblem(BilevelProblem):
    """Cross-entropy on batches ``(inputs, targets)`` or ``(inputs, targets, index)``.

    An example may have many answers, as a text has a next character at each place: then its loss
    is their mean. The hyperparameters act on the training loss alone: the validation loss is the
    plain mean cross-entropy and sees λ only through the weights.
    """

    hyper: HyperKind

    def __init__(self, model: nn.Module, hyper: HyperKind, splits: Splits) -> None:
        """Take the parts.

        Args:
            model: Maps inputs to logits of shape (B, classes), or (B, classes, ...).
            hyper: A kind of hyperparameters, or a `Compose` of several.
            splits: Loaders of batches as above; targets are class numbers, shape (B,) or (B, ...).

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
        """Return the mean of the examples' losses, with the hyperparameters at work."""
        inputs, targets, *rest = batch
        index = rest[0] if rest else None
        with self.hyper.applied():
            logits = self.model(self.hyper.inputs(inputs, index))
        losses = self.hyper.criterion(_CROSS_ENTROPY)(logits, targets)
        if losses.ndim > 1:
            losses = losses.flatten(1).mean(dim=1)
        return self.hyper.weigh(losses, index).mean()

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy and the fraction of wrong answers."""
        logits = self.model(batch[0])
        wrong = logits.argmax(dim=1) != batch[1]
        return {"loss": F.cross_entropy(logits, batch[1]), "error": wrong.float().mean()}

    def penalty(self) -> Penalty | None:
        """Return the hyperparameters' penalty."""
        return self.hyper.penalty()

    def summary(self) -> dict[str, float]:
        """Return the hyperparameters' summary."""
        return self.hyper.summary()

    def words(self) -> str:
        """Return the hyperparameters' sentence."""
        return self.hyper.words()

    def views(self) -> list[View]:
        """Return the hyperparameters' pictures."""
        return self.hyper.views()


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
