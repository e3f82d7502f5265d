"""The base of the ready-made problems: a model's outputs against targets, any kinds at work."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.hyper.answers import Answers, example_losses, may_read, require_one_example_each
from ift_tune.hyper.base import HyperKind, kinds_in
from ift_tune.hyper.own_loss import SUCCESSORS, are_near, explaining, forms_of
from ift_tune.hyper.seen import sole_input
from ift_tune.hyper.weighing import made_criterion, require_as_many
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import is_stacked
from ift_tune.problem.batches import LABELS, Batch
from ift_tune.problem.loaders import rows_of_loader
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.outputs import OUTPUTS, Parts, Reading, batch_parts, call_model
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.problem.sizes import guess_batch_size

_log = logging.getLogger(__name__)


class SupervisedProblem(BilevelProblem):
    """A model's outputs against targets, on batches ``(inputs, targets)`` or with an index.

    What classification and regression share. The hyperparameters act on the training loss alone:
    the validation loss is the plain mean and sees λ only through the weights, but for what is part
    of the model itself, as the scales of `AdapterScale` are. A batch ``(inputs, targets, index)``
    also tells each example's position in the training split.

    Batches may have names instead, ``{"input_ids": ..., "labels": ..., "index": ...}``, which the
    model is called with. What a model predicts is read from a tensor, a tuple, a mapping or an
    object; where a model that is given the targets returns its own ``loss``, that is the loss
    (``docs/data.md``).

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
    _warned: bool = False  # of a loss that is left out
    _forms: Mapping[int, str | None] = MappingProxyType({})  # of predictions, see `_form`
    _told_lengths: bool = False  # that examples have different numbers of answers

    def __init__(self, model: nn.Module, hyper: HyperKind, splits: Splits) -> None:
        """Take the parts.

        Args:
            model: Maps inputs (B, ...) to outputs that `prediction_loss` takes.
            hyper: A kind of hyperparameters, or a `Compose` of several.
            splits: Loaders of batches as above.

        Raises:
            UsageError: If `hyper` is not a `HyperKind`, or `splits` not `Splits`.
        """
        if not isinstance(hyper, HyperKind):
            raise UsageError(
                f"hyper must be a kind of hyperparameters such as WeightDecay, got "
                f"{type(hyper).__name__}; for a module of your own, subclass BilevelProblem"
            )
        if not isinstance(splits, Splits):
            raise UsageError(
                "splits must be Splits(train=..., val=..., search=..., test=...), loaders by their "
                f"names, got a {type(splits).__name__}"
            )
        self.model, self.hyper, self.splits = model, hyper, splits
        rows = rows_of_loader(splits.train)
        for kind in kinds_in(hyper, HyperKind):  # type: ignore[type-abstract]
            known = kind.examples_known
            if known is not None and rows is not None and known != rows:
                _log.warning(
                    "%s is of %s examples, and there are %s training examples: make it of the "
                    "training split, each example's part by its position there",
                    type(kind).__name__,
                    f"{known:,}",
                    f"{rows:,}",
                )

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

        Raises:
            UsageError: If a kind acts on the losses of single examples, and the model tells its
                mean loss alone; or a kind makes more of them, or fewer.
        """
        parts = self.batch_parts(batch)
        inputs, targets, index, _ = parts
        if index is not None and self.hyper.takes_index and self._reads(targets):
            require_one_example_each(index, targets)
        with self.hyper.applied():
            found = self._call(parts._replace(inputs=self._changed(inputs, index)))
        if found.loss is not None and not self.hyper.takes_losses:
            self._trained = True
            return found.loss
        answers = self._answers_of(found, parts)
        each = partial(self.prediction_loss, reduction="none")
        criterion = made_criterion(each, self.hyper, self.hyper.criterion)
        losses = criterion(answers.outputs, answers.targets)
        if not self._trained:
            self._look_at(found)
        found_losses = example_losses(losses, answers.outputs.size(0), answers.counted)
        self._warn_of_lengths(found_losses.shares, targets)
        self._trained = True
        weighed = self.hyper.weigh_seen(found_losses.losses, sole_input(inputs), index)
        require_as_many(weighed, found_losses.losses, self.hyper)
        # What an example's answers count for comes last: the kinds see its own loss.
        return found_losses._replace(losses=weighed).mean()

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss, without the hyperparameters."""
        parts = self.batch_parts(batch)
        found = self._call(parts)
        if found.loss is not None:
            return found.loss
        return self.mean_loss(self._answers_of(found, parts))

    def example_losses(self, batch: Batch) -> tuple[Answers, Tensor]:
        """Return the answers of a batch, and the loss of each example without the hyperparameters.

        Shape (B,), a mean over the answers that count where an example has many.

        Raises:
            UsageError: If the model tells its mean loss alone.
        """
        parts = self.batch_parts(batch)
        answers = self._answers_of(self._call(parts), parts)
        losses = self.prediction_loss(answers.outputs, answers.targets, reduction="none")
        return answers, example_losses(losses, len(answers.outputs), answers.counted).losses

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

    def batch_parts(self, batch: Batch) -> Parts:
        """Return inputs, targets and index of a batch; override it for batches of another form.

        Raises:
            UsageError: If the batch has none of the forms.
        """
        return batch_parts(batch, type(self).__name__)

    def batch_size(self, batch: Batch) -> float:
        """Return the number of targets of a batch, one an example."""
        targets = self.batch_parts(batch).targets
        if targets is None:
            return guess_batch_size(batch)
        return targets.size(0)  # not len(), which costs more: each inner step asks

    def _call(self, parts: Parts) -> Reading:
        """Return what the model makes of a batch; its own loss only where that is what counts."""
        found = call_model(self.model, parts.inputs, parts.labels)
        if found.ignored and not self._warned:
            self._warned = True
            _log.warning(
                "the model returns %s beside its predictions, which is part of no loss here: let "
                "the model take the targets and return the sum as its loss, or subclass "
                "BilevelProblem",
                ", ".join(found.ignored),
            )
        # Whoever writes a loss of the predictions means it.
        return found if self._is_ready_made() else found._replace(loss=None)

    def _is_ready_made(self) -> bool:
        """Return whether what the losses are made of comes with the package."""
        own = (type(self).prediction_loss, type(self).answers, type(self).mean_loss)
        return all(method.__module__.startswith("ift_tune.hyper.") for method in own)

    def _answers_of(self, found: Reading, parts: Parts) -> Answers:
        """Return the answers, whose losses can be taken one by one.

        Raises:
            UsageError: If there are none, or the mean of their losses is not the model's own loss.
        """
        if found.outputs is None or parts.targets is None:
            lacking = "the loss alone" if found.outputs is None else "a batch without targets"
            raise UsageError(
                "the losses of single examples must have predictions and targets: let the model "
                f"return {OUTPUTS[0]!r} too, and the batch hold {LABELS[0]!r}, got {lacking}"
            )
        if found.loss is None:
            return self.answers(found.outputs, parts.targets)
        if (answers := self._explained(found, parts)) is None:
            raise UsageError(
                "the loss that the model computes must be the mean of its predictions' losses "
                "where a kind of hyperparameters acts on those: give the batch as (inputs, "
                "targets), so that the model does not compute it, or subclass BilevelProblem; got "
                f"{float(found.loss.detach()):.6g}, which is no such mean of predictions of shape "
                f"{tuple(found.outputs.shape)}"
            )
        return answers

    def _explained(self, found: Reading, parts: Parts) -> Answers | None:
        """Return the answers whose mean loss is the model's own loss; None if it is not."""
        outputs, targets = found.outputs, parts.targets
        if outputs is None or found.loss is None or targets is None:
            return None
        form = forms_of(outputs, targets).get(self._form(parts, found) or "")
        if form is None:
            return None
        with contextlib.suppress(UsageError):
            answers = self.answers(*form)
            # What the model adds to its loss is seen as it is added; no step on a GPU waits for it.
            if not self._reads(targets) or are_near(
                self.mean_loss(answers), found.loss, outputs.dtype
            ):
                return answers
        return None

    def _form(self, parts: Parts, found: Reading | None = None) -> str | None:
        """Return the form of its predictions whose mean loss the model's own loss is.

        It is decided once for targets of so many dimensions, and not by each batch anew: in
        bfloat16, and by chance, the losses of several forms may be as good as equal. Where nobody
        can tell, as of a compiled model that predicts all classes alike, it is asked again.

        Args:
            parts: The batch.
            found: What the model has returned in training, where it may compute a loss alone.
        """
        targets = parts.targets
        if targets is None or not parts.labels:
            return None  # it computes no loss
        if targets.ndim not in self._forms:
            if is_stacked(targets):
                return "as they are"
            with (
                torch.enable_grad(),
                torch.autocast(targets.device.type, enabled=False),
                drawn_again(GlobalState(targets.device), targets.device),
                evaluating(self.model),
                preserved_buffers(self.model),
            ):
                asked = self._call(parts)
                if asked.loss is None and found is not None:
                    asked = found
                outputs, own = asked.outputs, asked.loss
                if outputs is None or own is None or not bool(own.isfinite()):
                    return None  # a batch without any target that counts has no mean

                def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
                    return self.mean_loss(self.answers(outputs, targets))

                forms = explaining(outputs, own, targets, mean_loss)
            first = forms[0] if forms else None
            if len(forms) > 1 and SUCCESSORS in forms:
                return first
            self._forms = {**self._forms, targets.ndim: first}
        return self._forms[targets.ndim]

    def _predicts_successors(self, parts: Parts) -> bool:
        """Return whether the model's own loss has each token predict the target of the next one.

        The first target of each text then counts in no mean.
        """
        return self._form(parts) == SUCCESSORS

    def _changed(self, inputs: Any, index: Tensor | None) -> Any:
        """Return the inputs as the kinds change them: the one tensor, if it has a name too."""
        changed = self.hyper.inputs(sole_input(inputs), index)
        return changed if sole_input(inputs) is inputs else dict.fromkeys(inputs, changed)

    def _look_at(self, found: Reading) -> None:
        """Look at what the model returns for the first batch, and say what is odd about it."""

    def _warn_of_lengths(self, shares: Tensor | None, targets: Tensor | None) -> None:
        """Say once that a kind weighs examples as if all had as many answers, and they have not."""
        if shares is None or self._told_lengths or not self._reads(targets):
            return
        for kind in kinds_in(self.hyper, HyperKind):  # type: ignore[type-abstract]
            if kind.assumes_equal_answers and bool((shares != shares[:1]).any()):
                self._told_lengths = True
                _log.warning(
                    "%s takes the shares of the sources by examples, and the loss is a mean over "
                    "answers, of which some examples have more that count: say how many by "
                    "answers=[...], unless all sources have as many on average",
                    type(kind).__name__,
                )

    def _reads(self, targets: Tensor | None) -> bool:
        """Return whether to look at the values of a batch; at those of the first in any case."""
        if is_stacked(targets):
            return False
        return not self._trained or (targets is not None and may_read(targets, self.hyper))

    def penalty(self) -> Penalty | None:
        """Return the hyperparameters' penalty, whatever `train_loss` does: leave it out there."""
        return self.hyper.penalty()


def positions(problem: BilevelProblem, batch: Batch) -> Tensor:
    """Return the positions in the training split of the examples of a training batch.

    Raises:
        UsageError: If it does not tell.
    """
    if isinstance(problem, SupervisedProblem):
        index = problem.batch_parts(batch).index
    else:
        index = batch_parts(batch, type(problem).__name__).index
    if index is None:
        raise UsageError(
            "the training batches must tell which examples they hold: let the loaders of the "
            "training split (and Splits.curvature) yield (inputs, targets, index), got no index"
        )
    return torch.as_tensor(index).long()
