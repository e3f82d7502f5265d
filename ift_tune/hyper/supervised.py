"""The ready-made problems: classification and regression with any kind of hyperparameters."""

from __future__ import annotations

import abc
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.hyper.base import HyperKind
from ift_tune.implicit.penalty import Penalty
from ift_tune.problem.batches import Batch
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
        inputs, targets, *rest = batch
        index = rest[0] if rest else None
        with self.hyper.applied():
            outputs = self.model(self.hyper.inputs(inputs, index))
        each = partial(self.prediction_loss, reduction="none")
        losses = self.hyper.criterion(each)(outputs, targets)
        # An example may have many answers, as a text has a next character at each place. Their mean
        # is taken first: examples are weighed, not answers.
        if losses.ndim > 1:
            losses = losses.flatten(1).mean(dim=1)
        return self.hyper.weigh(losses, index).mean()

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss, without the hyperparameters."""
        return self.prediction_loss(self.model(batch[0]), batch[1], reduction="mean")

    def penalty(self) -> Penalty | None:
        """Return the hyperparameters' penalty."""
        return self.hyper.penalty()


class ClassificationProblem(SupervisedProblem):
    """Cross-entropy on batches ``(inputs, targets)`` or ``(inputs, targets, index)``.

    The model maps inputs to logits of shape (B, classes), or (B, classes, ...); targets are class
    numbers, shape (B,) or (B, ...). Of many answers to one example the loss is their mean.

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

    def prediction_loss(
        self, outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"]
    ) -> Tensor:
        """Return the cross-entropy; targets are class numbers, or probabilities of the classes."""
        return F.cross_entropy(outputs, targets, reduction=reduction)

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy and the fraction of wrong answers."""
        logits = self.model(batch[0])
        wrong = logits.argmax(dim=1) != batch[1]
        return {"loss": F.cross_entropy(logits, batch[1]), "error": wrong.float().mean()}


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
            UsageError: If predictions and targets differ in shape.
        """
        # PyTorch would broadcast (B, 1) against (B,) to a table of all pairs, with a warning only.
        if outputs.shape != targets.shape:
            raise UsageError(
                f"the model predicts shape {tuple(outputs.shape)} and the targets have shape "
                f"{tuple(targets.shape)}: end the model with nn.Flatten(0), or give targets "
                "a column"
            )
        return F.mse_loss(outputs, targets, reduction=reduction)
