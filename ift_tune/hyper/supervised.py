"""The ready-made problems: classification and regression with any kind of hyperparameters."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.hyper.answers import (
    Answers,
    class_answers,
    example_losses,
    may_read,
    require_one_example_each,
)
from ift_tune.hyper.base import HyperKind
from ift_tune.implicit.penalty import Penalty
from ift_tune.problem.batches import Batch
from ift_tune.problem.evaluation import mean_metrics
from ift_tune.problem.problem import BilevelProblem, Splits


class SupervisedProblem(BilevelProblem):
    """A model's outputs against targets, on batches ``(inputs, targets)`` or with an index.

    What classification and regression share. The hyperparameters act on the training loss alone:
    the validation loss is the plain mean and sees λ only through the weights. A batch
    ``(inputs, targets, index)`` also tells each example's position in the training split.

    A subclass gives `prediction_loss`:

        >>> import torch, ift_tune
        >>> from torch.nn.functional import poisson_nll_loss
        >>> class CountProblem(ift_tune.SupervisedProblem):
        ...     def prediction_loss(self, outputs, targets, reduction):
        ...         return poisson_nll_loss(outputs, targets, reduction=reduction)
        >>> batch = torch.ones(4, 2), torch.tensor([1.0, 0.0, 2.0, 1.0])
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0))
        >>> hyper = ift_tune.WeightDecay(model, "model", init=0.5)
        >>> problem = CountProblem(model, hyper, ift_tune.Splits(*[[batch]] * 4))
        >>> problem.words()
        'weight decay: min 0.5, median 0.5, mean 0.5, max 0.5'
    """

    hyper: HyperKind
    _trained: bool = False  # whether `train_loss` has been through once

    def __init__(self, model: nn.Module, hyper: HyperKind, splits: Splits) -> None:
        """Take the parts.

        Args:
            model: Maps inputs (B, ...) to outputs that `prediction_loss` takes.
            hyper: A kind of hyperparameters, or a `Compose` of several.
            splits: Loaders of batches as above.

        Raises:
            UsageError: If `hyper` is not a `HyperKind`.
        """
        if not isinstance(hyper, HyperKind):
            raise UsageError(
                f"hyper must be a kind of hyperparameters such as WeightDecay, got "
                f"{type(hyper).__name__}; for a module of your own, subclass BilevelProblem"
            )
        self.model, self.hyper, self.splits = model, hyper, splits

    @abc.abstractmethod
    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        """Return the loss of each example, shape (B, ...), or the mean of them, a scalar.

        Args:
            outputs: The model's.
            targets: Those of the batch; in training, as the kinds have changed them.
            reduction: As PyTorch's losses take it.
        """

    def train_loss(self, batch: Batch) -> Tensor:
        """Return the mean of the examples' losses, with the hyperparameters at work.

        The hooks of all kinds are called here, whatever the model's mode, and always in this order,
        so that any two kinds compose; what they return in closed form, `penalty`, comes on top.
        """
        inputs, targets, index = self._parts(batch)
        if index is not None and self.hyper.takes_index and self._reads(targets):
            require_one_example_each(index, targets)
        with self.hyper.applied():
            outputs = self._outputs(self.hyper.inputs(inputs, index))
        outputs, targets, counted = self.answers(outputs, targets)
        each = partial(self.prediction_loss, reduction="none")
        losses = self.hyper.criterion(each)(outputs, targets)
        losses = example_losses(losses, outputs.size(0), counted)
        self._trained = True
        return self.hyper.weigh(losses, index).mean()

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss, without the hyperparameters."""
        return self.mean_loss(self._answers(batch))

    def answers(self, outputs: Tensor, targets: Tensor) -> Answers:
        """Return outputs and targets in the form that the losses take, and which of them count.

        In training and in validation alike. A subclass refuses here what it cannot take.
        """
        return Answers(outputs, targets)

    def mean_loss(self, answers: Answers) -> Tensor:
        """Return the mean loss of the answers that count, without the hyperparameters."""
        outputs, targets, counted = answers
        if counted is None:
            return self.prediction_loss(outputs, targets, reduction="mean")
        losses = self.prediction_loss(outputs, targets, reduction="none")
        return example_losses(losses, len(outputs), counted).mean()

    def batch_size(self, batch: Batch) -> float:
        """Return the number of targets of a batch, one an example."""
        _, targets, _ = self._parts(batch)
        return targets.size(0)  # not len(), which costs more: each inner step asks

    def _answers(self, batch: Batch) -> Answers:
        inputs, targets, _ = self._parts(batch)
        return self.answers(self._outputs(inputs), targets)

    def _outputs(self, inputs: Any) -> Tensor:
        outputs = self.model(inputs)
        if not isinstance(outputs, Tensor):
            raise UsageError(
                "the model must return one tensor: wrap it in a module that returns the outputs "
                f"alone, or subclass BilevelProblem, got a {type(outputs).__name__}"
            )
        return outputs

    def _reads(self, targets: Tensor) -> bool:
        """Return whether to look at the values of a batch; at those of the first in any case."""
        return not self._trained or may_read(targets, self.hyper)

    def _parts(self, batch: Batch) -> tuple[Any, Tensor, Any]:
        """Return inputs, targets and index of a batch."""
        if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
            size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise UsageError(
                f"batches of a {type(self).__name__} must be (inputs, targets) or (inputs, "
                "targets, index): let the loader yield them so, or subclass BilevelProblem; got a "
                f"{type(batch).__name__}{size}"
            )
        inputs, targets, *rest = batch
        if not isinstance(targets, Tensor) or not targets.ndim:
            found = "a scalar" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
            raise UsageError(
                "the targets of a batch must be a tensor with an entry for each example: convert "
                f"arrays by torch.as_tensor, got {found}"
            )
        return inputs, targets, rest[0] if rest else None

    def penalty(self) -> Penalty | None:
        """Return the hyperparameters' penalty."""
        return self.hyper.penalty()


class ClassificationProblem(SupervisedProblem):
    """Cross-entropy on batches ``(inputs, targets)`` or ``(inputs, targets, index)``.

    The model maps inputs to logits of shape (B, classes), or (B, classes, ...); targets are class
    numbers, shape (B,) or (B, ...), or probabilities of the logits' shape. One logit, (B,) or
    (B, 1, ...), is that of class 1 of two. Of many answers to one example the loss is their mean.

    Attributes:
        ignore_index: The target of an answer that does not count, such as padding: neither in the
            losses nor in the error. The means are over the others, in training and evaluation.

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

    ignore_index: ClassVar[int] = -100

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

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and the fraction of wrong answers, of the answers that count."""
        answers = self._answers(batch)
        logits, targets, counted = answers
        right = targets if targets.ndim < logits.ndim else targets.argmax(dim=1)
        wrong = logits.argmax(dim=1) != right
        if counted is not None:
            wrong = wrong[counted] if bool(counted.any()) else wrong & counted
        return {"loss": self.mean_loss(answers), "error": wrong.float().mean()}

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Return the means of `metrics` over all answers that count, however batches are cut.

        Where a subclass has a `batch_size` of its own, that is the weight of a batch.
        """
        if type(self).batch_size is not SupervisedProblem.batch_size:
            return super().evaluate(batches)
        return mean_metrics(self.metrics, self._count_answers, batches)

    def _count_answers(self, batch: Batch) -> float:
        _, targets, _ = self._parts(batch)
        if targets.is_floating_point():
            return len(targets) * math.prod(targets.shape[2:])
        return int((targets != self.ignore_index).sum())


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

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Return the means of `metrics` over all targets, however batches are cut.

        Where a subclass has a `batch_size` of its own, that is the weight of a batch.
        """
        if type(self).batch_size is not SupervisedProblem.batch_size:
            return super().evaluate(batches)
        return mean_metrics(self.metrics, lambda batch: self._parts(batch)[1].numel(), batches)
