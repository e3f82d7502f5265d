"""A weight for every training example."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.pictures import quantiles, sample
from ift_tune.hyper.transforms import Init, get_transform, initialise


class ExampleWeights(HyperKind):
    """The loss of training example i is multiplied by c(λᵢ), c = sigmoid or softplus.

    The batch loss stays the mean over the batch.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.ExampleWeights(100, init=0.5)
        >>> kind.weigh(torch.tensor([2.0, 6.0]), index=torch.tensor([0, 42]))
        tensor([1., 3.], grad_fn=<MulBackward0>)
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
        if examples < 1:
            raise UsageError(f"examples must be at least 1, got {examples}")
        self.transform = get_transform(transform, ("sigmoid", "softplus"))
        raw = torch.empty(examples) if like is None else like.new_empty(examples)
        initialise(raw, init, self.transform.inverse, "a weight inside the range of the transform")
        self.raw = nn.Parameter(raw)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Return the weights of the examples at `index`, shape (B,); all of them without it."""
        return self.transform.forward(self.raw if index is None else self.raw[index])

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Multiply each loss by its example's weight.

        Raises:
            UsageError: If the loader gives no index.
        """
        if index is None:
            raise UsageError(
                "example weights need to know which examples are in a batch: let the training "
                "loader yield (inputs, targets, index)"
            )
        weights: Tensor = self(index)
        # Not divided by their sum: examples would compete for a fixed total within each batch.
        return losses * weights

    def summary(self) -> dict[str, float]:
        """Return quantiles of the weights."""
        return quantiles(self())

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the weights are distributed."""
        return [Histogram("weights of the examples", {"all": sample(self())}, "weight")]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a weight for each example."""
        return cls(len(inputs), like=next(model.parameters()))
