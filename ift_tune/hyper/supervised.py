"""The ready-made problems: classification and regression with any kind of hyperparameters."""

from __future__ import annotations

import contextlib
import logging
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError
from ift_tune.base.once import is_new
from ift_tune.hyper.answers import Answers, class_answers, count_but, look_like_probabilities
from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.predictions import SupervisedProblem as SupervisedProblem
from ift_tune.implicit.vectors import is_stacked
from ift_tune.problem.batches import Batch
from ift_tune.problem.outputs import Parts, Reading
from ift_tune.problem.problem import Splits

_log = logging.getLogger(__name__)


PROBABILITIES = (
    "the model must return logits, and what it returns looks like probabilities: leave its last "
    "softmax out, for the cross-entropy has one of its own, and training through two is slow"
)
"""What is said of a model that ends in a softmax."""


class ClassificationProblem(SupervisedProblem):
    """Cross-entropy on batches ``(inputs, targets)`` or ``(inputs, targets, index)``.

    The model maps inputs to logits of shape (B, classes), or (B, classes, ...); targets are class
    numbers, shape (B,) or (B, ...), or probabilities of the logits' shape. One logit, (B,) or
    (B, 1, ...), is that of class 1 of two. Of many answers to one example the loss is their mean.

    Attributes:
        ignore_index: The target of an answer that does not count, such as padding: neither in the
            losses nor in the error. The means are over the others, in training and evaluation. A
            subclass may give its own, or the argument does.

    Example:
        >>> import torch, ift_tune
        >>> inputs, targets = torch.eye(4), torch.tensor([0, 1, 2, 0])
        >>> model = torch.nn.Linear(4, 3)
        >>> train = ift_tune.Batches(inputs, targets, torch.arange(4))
        >>> other = ift_tune.Batches(inputs, targets)
        >>> splits = ift_tune.Splits(train=train, val=other, search=other, test=other)
        >>> hyper = ift_tune.ExampleWeights(4, init=0.25)
        >>> problem = ift_tune.ClassificationProblem(model, hyper, splits)
        >>> metrics = problem.metrics((inputs, targets))
        >>> sorted(metrics)
        ['error', 'loss']
        >>> (batch,) = train
        >>> torch.allclose(problem.train_loss(batch), 0.25 * metrics["loss"])
        True
    """

    ignore_index: int = -100

    def __init__(
        self,
        model: nn.Module,
        hyper: HyperKind,
        splits: Splits,
        *,
        ignore_index: int | None = None,
    ) -> None:
        """Take the parts.

        Args:
            model: Maps inputs (B, ...) to logits.
            hyper: A kind of hyperparameters, or a `Compose` of several.
            splits: Loaders of batches as above.
            ignore_index: The target of an answer that does not count; None: that of the class.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__(model, hyper, splits)
        if ignore_index is not None:
            if not isinstance(ignore_index, Integral):
                raise UsageError(f"ignore_index must be an integer, got {shown(ignore_index)}")
            self.ignore_index = int(ignore_index)

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        """Return the cross-entropy; targets are class numbers, or probabilities of the classes."""
        return F.cross_entropy(outputs, targets, reduction=reduction)

    def answers(self, outputs: Tensor, targets: Tensor) -> Answers:
        """Return logits of at least two classes, and class numbers or probabilities.

        Raises:
            UsageError: If the targets are neither.
        """
        return class_answers(outputs, targets, self.ignore_index, read=self._reads(targets))

    def gets_probabilities(self, batch: Batch) -> bool:
        """Return whether the cross-entropy, which takes logits, gets what looks like probabilities.

        Args:
            batch: Of a few examples at least.
        """
        return self._are_probabilities(self._call(self.batch_parts(batch)))

    def _are_probabilities(self, found: Reading) -> bool:
        own = type(self).prediction_loss is not ClassificationProblem.prediction_loss
        if own or found.loss is not None or found.outputs is None:
            return False
        return look_like_probabilities(found.outputs)

    def _look_at(self, found: Reading) -> None:
        if self._are_probabilities(found) and is_new(PROBABILITIES):
            _log.warning("%s", PROBABILITIES)

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and the fraction of wrong answers, of the answers that count.

        The loss alone if the model computes it, and does not tell answers that explain it.
        """
        parts = self.batch_parts(batch)
        found = self._call(parts)
        if found.loss is None:
            answers = self._answers_of(found, parts)
            loss = self.mean_loss(answers)
        elif (known := self._clear_answers(found, parts)) is not None:
            answers, loss = known, found.loss
        else:
            return {"loss": found.loss}
        logits, targets, counted = answers
        right = targets if targets.ndim < logits.ndim else targets.argmax(dim=1)
        wrong = (logits.argmax(dim=1) != right).float()
        if counted is None:
            return {"loss": loss, "error": wrong.mean()}
        wrong = torch.where(counted, wrong, 0.0).sum() / counted.sum().clamp(min=1)
        return {"loss": loss, "error": wrong}

    def _clear_answers(self, found: Reading, parts: Parts) -> Answers | None:
        """Return the answers beside a loss of the model's own; None if they are not clear."""
        targets = parts.targets
        if self._predicts_successors(parts):
            return None
        if found.outputs is None or targets is None or found.outputs.ndim != 2:
            return self._explained(found, parts)
        with contextlib.suppress(UsageError):
            return self.answers(found.outputs, targets)
        return None

    def metric_weight(self, batch: Batch) -> float | Tensor:
        """Return the number of answers that count: means are over all, however batches are cut.

        Where a subclass has a `batch_size` of its own, that is the weight of a batch.
        """
        parts = self.batch_parts(batch)
        targets = parts.targets
        if targets is None or type(self).batch_size is not SupervisedProblem.batch_size:
            return super().metric_weight(batch)
        if self._predicts_successors(parts):
            targets = targets[:, 1:]
        if is_stacked(targets):
            return targets.numel()  # of several trials' one batch, whose weight does not matter
        return count_but(targets, self.ignore_index)

    def loss_size(self, batch: Batch) -> float | Tensor:
        """Return the number of answers that count, as in the means of `evaluate`."""
        return self.metric_weight(batch)


class RegressionProblem(SupervisedProblem):
    """Mean squared error on batches ``(inputs, targets)`` or ``(inputs, targets, index)``.

    The model maps inputs to predictions of the targets' shape, (B, ...); targets are real numbers.
    Of many targets to one example the loss is their mean.

    Example:
        >>> import torch, ift_tune
        >>> inputs = torch.tensor([[1.0], [2.0], [3.0]])
        >>> model = torch.nn.Linear(1, 1)
        >>> data = ift_tune.Batches(inputs, 2.0 * inputs)
        >>> hyper = ift_tune.WeightDecay(model, "tensor", init=0.01)
        >>> problem = ift_tune.RegressionProblem(model, hyper, ift_tune.Splits(*[data] * 4))
        >>> wrong = inputs, torch.tensor([2.0, 4.0, 6.0])
        >>> problem.val_loss(wrong)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ift_tune.base.errors.UsageError: the model predicts shape (3, 1) and the targets ...
    """

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        """Return the squared error.

        Raises:
            UsageError: If predictions and targets differ in shape, or targets are no real numbers.
        """
        if not targets.is_floating_point():
            raise UsageError(
                "targets of a RegressionProblem must be real numbers: give targets.float(), got "
                f"{targets.dtype}"
            )
        # PyTorch would broadcast (B, 1) against (B,) to a table of all pairs, with a warning only.
        if outputs.shape != targets.shape:
            raise UsageError(
                f"the model predicts shape {tuple(outputs.shape)} and the targets have shape "
                f"{tuple(targets.shape)}: end the model with nn.Flatten(0), or give targets "
                "a column"
            )
        return F.mse_loss(outputs, targets, reduction=reduction)

    def metric_weight(self, batch: Batch) -> float | Tensor:
        """Return the number of targets: means are over all, however batches are cut.

        Where a subclass has a `batch_size` of its own, that is the weight of a batch.
        """
        targets = self.batch_parts(batch).targets
        if targets is None or type(self).batch_size is not SupervisedProblem.batch_size:
            return super().metric_weight(batch)
        return targets.numel()
