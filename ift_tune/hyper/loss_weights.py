"""Weights in the training loss: one for every example, or one for each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, require_integer
from ift_tune.base.randomness import RandomStream
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.answers import as_positions
from ift_tune.hyper.arguments import new_raw, whole_number
from ift_tune.hyper.base import CoarseParameter, Criterion, HyperKind
from ift_tune.hyper.class_targets import ClassTargets, along_classes, require_classes
from ift_tune.hyper.pictures import quantiles, sample
from ift_tune.hyper.predictions import positions
from ift_tune.hyper.transforms import Init, get_transform, initialise
from ift_tune.hyper.weighing import times
from ift_tune.problem.batches import Batch, to_device
from ift_tune.problem.loaders import once_through
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size


class ExampleWeights(HyperKind):
    """The loss of training example i is multiplied by c(λᵢ), c = sigmoid or softplus.

    The batch loss stays the mean over the batch.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.ExampleWeights(100, init=0.5)
        >>> kind.weigh(torch.tensor([2.0, 6.0]), index=torch.tensor([0, 42]))
        tensor([1., 3.], grad_fn=<MulBackward0>)
        >>> kind.raw.data[7], kind.raw.data[3] = -2.0, -1.0
        >>> kind.suspects(2).tolist()
        [7, 3]
    """

    name: ClassVar[str] = "example_weights"

    def __init__(
        self,
        examples: int,
        *,
        init: Init = 0.5,
        transform: Literal["sigmoid", "softplus"] = "sigmoid",
        like: Tensor | None = None,
    ) -> None:
        """Make one raw parameter per example.

        Args:
            examples: Size of the training split.
            init: The weight to start from; or a function that fills the raw λ in place.
            transform: c: ``"sigmoid"`` keeps weights in (0, 1), ``"softplus"`` only positive.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        examples = whole_number("examples", examples)
        self.transform = get_transform(transform, ("sigmoid", "softplus"))
        raw = new_raw(examples, like)
        initialise(raw, init, self.transform.inverse, "a weight inside the range of the transform")
        self.raw = nn.Parameter(raw)

    @property
    def examples_known(self) -> int | None:
        """How many training examples have a weight."""
        return len(self.raw)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Return the weights of the examples at `index`, shape (B,); all of them without it."""
        return self.transform.forward(self.raw if index is None else self.raw[index])

    @torch.no_grad()
    def suspects(self, k: int) -> Tensor:
        """Return the positions in the training split of the k smallest weights, smallest first.

        Of equal ones, such as those that no outer step has met yet, the first come first.

        Raises:
            UsageError: If there are not so many examples.
        """
        require_integer("k", k, 1)
        if k > len(self.raw):
            raise UsageError(f"k must be at most the {len(self.raw)} examples, got {k}")
        return self.raw.argsort(stable=True)[:k]

    @torch.no_grad()
    def leave_out(self, index: Tensor) -> None:
        """Give the examples at `index` the weight 0: for trainings in which λ stays."""
        self.raw[index] = -torch.inf  # where both transforms are 0

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Multiply each loss by its example's weight.

        Raises:
            UsageError: If the loader gives no index, or not positions in the training split.
        """
        if index is None:
            raise UsageError(
                "example weights need to know which examples are in a batch: let the training "
                "loader yield (inputs, targets, index), as Splits.from_arrays(..., index=True) does"
            )
        weights: Tensor = self(as_positions(index, len(losses), len(self.raw), self))
        # Not divided by their sum: examples would compete for a fixed total within each batch.
        return times(losses, weights, self)

    def summary(self) -> dict[str, float]:
        """Return quantiles of the weights."""
        return quantiles(self())

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the weight of each example."""
        return {"weights": self()}

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the weights are distributed."""
        return [Histogram("weights of the examples", {"all": sample(self())}, "weight")]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a weight for each example."""
        return cls(len(inputs), like=next(model.parameters()))


def example_losses(problem: BilevelProblem, kind: ExampleWeights) -> Tensor:
    """Return the training loss of each example at the present weights, without its own weight.

    It is what the training loss changes by with the example's weight, so that nothing needs to be
    known of how the loss is made: one pass over the training split, in evaluation mode. Of an
    example that the pass holds several times it is the mean, as where a sampler draws with
    replacement; of one that it does not hold, NaN.

    Args:
        problem: It stays as it is.
        kind: Its weights of the examples, or one of several.
    """
    losses, met = torch.zeros_like(kind.raw), torch.zeros_like(kind.raw)
    device = kind.raw.device
    with RandomStream(0, device).aside(), evaluating(problem.model):
        for batch in once_through(problem.splits.train):
            on_device = to_device(batch, device)
            (slope,) = torch.autograd.grad(problem.train_loss(on_device), [kind.raw])
            losses += slope * as_size(problem.batch_size(on_device))
            met += _times(problem, on_device, slope)
        (own,) = torch.autograd.grad(kind().sum(), [kind.raw])
    return losses / (own * met)  # 0/0 where it has not been met


def _times(problem: BilevelProblem, batch: Batch, slope: Tensor) -> Tensor:
    """Return how many times each example is in a batch; of one that tells none, 1 where it acts."""
    try:
        index = positions(problem, batch)
    except UsageError:
        return (slope != 0.0).to(slope)
    return torch.bincount(index.to(slope.device), minlength=len(slope)).to(slope)


_FEW = 12  # classes that are named one by one


class ClassWeights(HyperKind):
    """The loss of an example of class k is multiplied by c(λ_k), c = softplus or exp.

    Where a target is a distribution over the classes, by the expected weight. Where the loss has
    an entry for each of several labels, the entry of label k is multiplied by c(λ_k). The batch
    loss stays the mean over the batch.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.ClassWeights(3)
        >>> kind.set_coarse({"class_0": 1.0, "class_1": 2.0, "class_2": 0.5})
        >>> losses = kind.criterion(torch.nn.CrossEntropyLoss(reduction="none"))
        >>> first, second = losses(torch.zeros(2, 3), torch.tensor([0, 1])).detach()
        >>> round(float(second / first), 3)
        2.0
    """

    name: ClassVar[str] = "class_weights"

    def __init__(
        self,
        classes: int,
        *,
        init: Init = 1.0,
        transform: Literal["softplus", "exp"] = "softplus",
        like: Tensor | None = None,
    ) -> None:
        """Make one raw parameter per class.

        Args:
            classes: The number of the model's outputs.
            init: The weight to start from, above 0; or a function that fills the raw λ in place.
            transform: c: ``"softplus"`` moves large weights evenly, ``"exp"`` moves all by factors.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        self.classes = require_classes(classes)
        self.transform = get_transform(transform, ("softplus", "exp"))
        raw = new_raw(self.classes, like)
        initialise(raw, init, self.transform.inverse, "a weight above 0")
        self.raw = nn.Parameter(raw)
        self._targets = ClassTargets(
            type(self).__name__,
            self.classes,
            instead=f"PositionWeights({self.classes}) has a weight for each label",
        )

    def forward(self) -> Tensor:
        """Return the weights of the classes, shape (classes,)."""
        return self.transform.forward(self.raw)

    def of_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weight of each target, shape (B, ...).

        Args:
            logits: The model's outputs (B, classes, ...); only their shape is read.
            targets: Class numbers (B, ...), or probabilities (B, classes, ...).

        Raises:
            UsageError: If they are neither, or of other classes.
        """
        weights: Tensor = self()
        if self._targets.are_numbers(logits, targets, self.raw):
            return weights[targets]
        return (targets * along_classes(weights, logits)).sum(dim=1)

    def criterion(self, loss: Criterion) -> Criterion:
        """Return the loss, weighted."""

        def weighted(logits: Tensor, targets: Tensor) -> Tensor:
            losses = loss(logits, targets)
            # Not divided by the sum of the weights, as PyTorch's `weight=` is: a batch with more
            # examples of a heavy class counts for more.
            if losses.shape == targets.shape == logits.shape:
                self._targets.require_logits(logits)
                return losses * along_classes(self(), logits)
            return times(losses, self.of_targets(logits, targets), self)

        return weighted

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the weights of a few classes; none if there are many."""
        if self.classes > _FEW:
            return {}
        return {name: CoarseParameter.near(0.1, 10.0, w) for name, w in self.summary().items()}

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Give every class its weight."""
        if values:
            for k, raw in enumerate(self.raw):
                initialise(raw, values[f"class_{k}"], self.transform.inverse, "a weight above 0")

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return the weights, or quantiles of many."""
        weights = self()
        if self.classes > _FEW:
            return quantiles(weights)
        return {f"class_{k}": value for k, value in enumerate(weights.tolist())}

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the weight of each class."""
        return {"weights": self()}

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the weights of many classes are distributed; a few are in the summary."""
        if self.classes <= _FEW:
            return []
        return [Histogram("weights of the classes", {"all": self().cpu()}, "weight", log=True)]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a weight for each of the model's classes."""
        with torch.no_grad():
            classes = model(inputs).shape[1]
        return cls(classes, like=inputs)
