"""The problem that an estimator's trials solve: its rows, its model and its hyperparameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError
from ift_tune.hyper.answers import Answers
from ift_tune.hyper.supervised import ClassificationProblem, RegressionProblem
from ift_tune.problem.batches import Batches
from ift_tune.problem.modes import evaluating
from ift_tune.problem.outputs import call_model
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.sklearn.kinds import Bench, Tune, make_kind
from ift_tune.sklearn.rows import Rows

_PROBED = 64  # rows by which a module is looked at

_AT_ONCE = 4096
"""Most rows of a batch of an outer step where each example has a weight, and of an evaluation."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """Makes the problem: the factory of an estimator's run.

    Attributes:
        module: What the user gave; None for the default.
        tune: What is learned.
        hidden: Units of the hidden layers of the default.
        classes: How many there are; None in regression.
        train: Rows that weights are fitted on.
        val: Rows that hyperparameters are fitted on.
        search: Rows by which steps and trials are chosen.
        batch_size: Of the inner steps; None for all rows.
    """

    module: Any
    tune: Tune
    hidden: tuple[int, ...]
    classes: int | None
    train: Rows
    val: Rows
    search: Rows
    batch_size: int | None

    def __call__(self, config: object, device: torch.device, seed: int) -> BilevelProblem:
        """Build it."""
        model = self._model().to(device)
        like = first_weight(model)
        train, val, search = (
            self._tensors(name, getattr(self, name), like) for name in ("train", "val", "search")
        )
        self._require_outputs(model, train)
        hyper = make_kind(self.tune, Bench(model, *train, self.classes), self.module)
        columns: tuple[Tensor, ...] = train
        curvature = None
        if hyper.takes_index:
            columns = (*train, torch.arange(len(train[0]), device=device))
            # An outer step moves the weights of the examples that it meets, and of no other.
            curvature = _batches(columns, _AT_ONCE, seed)
        ordered = _batches(search, _AT_ONCE, seed, shuffle=False)
        splits = Splits(
            train=_batches(columns, self.batch_size, seed),
            val=_batches(val, self.batch_size, seed + 1),
            search=ordered,
            test=ordered,  # an estimator is given no test rows, and says nothing of them
            curvature=curvature,
        )
        kind = ClassificationProblem if self.classes is not None else _Regression
        return kind(model, hyper, splits)

    @property
    def outputs(self) -> int:
        """The number of the model's outputs: one for each class, or each target."""
        if self.classes is not None:
            return self.classes
        return 1 if self.train.targets.ndim == 1 else self.train.targets.shape[1]

    def _model(self) -> nn.Module:
        columns = self.train.inputs.shape[1]
        if self.module is None:
            return _mlp([columns, *self.hidden, self.outputs])
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module)  # whose weights are where each training starts
        if not callable(self.module):
            raise UsageError(
                "module must be an nn.Module, a function (n_features, n_outputs) that returns one, "
                f"or None, got {shown(self.module)}"
            )
        _require_two_arguments(self.module)
        made = self.module(columns, self.outputs)
        if not isinstance(made, nn.Module):
            raise UsageError(
                f"module(n_features, n_outputs) must return an nn.Module, got {shown(made)}"
            )
        return made

    def _require_outputs(self, model: nn.Module, rows: tuple[Tensor, Tensor]) -> None:
        """Raise a `UsageError` unless the model has an output for each class, or target.

        A model with more logits than classes would train, and predict classes that nobody knows.
        """
        inputs, targets = (column[:_PROBED] for column in rows)
        try:
            with torch.no_grad(), evaluating(model):
                outputs = call_model(model, inputs).outputs
        except Exception as error:
            raise UsageError(
                f"module must take rows of {inputs.shape[1]} numbers, shape (B, "
                f"{inputs.shape[1]}): give a function (n_features, n_outputs), which is told how "
                f"many, or let it begin with nn.Unflatten, got {type(error).__name__}: {error}"
            ) from error
        if outputs is None:
            wanted, found = "predictions beside its loss", "the loss alone"
        elif self.classes is None:
            if as_targets(outputs, targets.ndim).shape == targets.shape:
                return
            wanted, found = f"{self.outputs} numbers a row", f"shape {tuple(outputs.shape)}"
        else:
            one_logit = self.classes == 2 and outputs.shape in [(len(inputs),), (len(inputs), 1)]
            if one_logit or outputs.shape == (len(inputs), self.classes):
                return
            wanted = f"a logit a row for each of {self.classes} classes"
            found = f"shape {tuple(outputs.shape)}"
        raise UsageError(
            f"module must return {wanted}: give a function (n_features, n_outputs), which is told "
            f"how many, got {found} for {len(inputs)} rows"
        )

    def _tensors(self, name: str, rows: Rows, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a split in the dtype and on the device of the weights."""
        inputs = torch.tensor(rows.inputs, dtype=like.dtype, device=like.device)
        dtype = like.dtype if self.classes is None else torch.int64
        targets = torch.tensor(rows.targets, dtype=dtype, device=like.device)
        if not (inputs.isfinite().all() and targets.isfinite().all()):
            raise UsageError(
                f"the rows must be within the range of the model's {like.dtype}: scale them, for "
                f"example by a StandardScaler before the estimator, got larger numbers in {name}"
            )
        return inputs, targets


def _require_two_arguments(module: Any) -> None:
    """Raise a `UsageError` unless what makes a module can be called with two numbers."""
    try:
        signature = inspect.signature(module)
    except ValueError:  # of some built-in functions nothing is known
        return
    try:
        signature.bind(1, 1)
    except TypeError as error:
        raise UsageError(
            "module must be a class or function that takes (n_features, n_outputs), such as "
            f"lambda n_features, n_outputs: Net(...), got {shown(module)} that takes {signature}"
        ) from error


def first_weight(model: nn.Module) -> Tensor:
    """Return a weight of a model, whose dtype and device inputs are to have.

    Raises:
        UsageError: If nothing of it is trained.
    """
    if (weight := next((p for p in model.parameters() if p.requires_grad), None)) is not None:
        return weight
    number = sum(1 for _ in model.parameters())
    raise UsageError(f"module must have weights to train, got {number} parameters, all frozen")


class _Regression(RegressionProblem):
    def answers(self, outputs: Tensor, targets: Tensor) -> Answers:
        return Answers(as_targets(outputs, targets.ndim), targets)


def as_targets(outputs: Tensor, ndim: int) -> Tensor:
    """Return predictions (B, 1) as (B,) where the targets have that shape, and the other way."""
    if outputs.ndim == 2 and outputs.shape[1] == 1 and ndim == 1:
        return outputs.squeeze(1)
    return outputs.unsqueeze(1) if outputs.ndim == 1 and ndim == 2 else outputs


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _batches(
    columns: Sequence[Tensor], size: int | None, seed: int, *, shuffle: bool = True
) -> Batches:
    whole = size is None or size >= len(columns[0])
    return Batches(*columns, batch_size=None if whole else size, seed=seed, shuffle=shuffle)
