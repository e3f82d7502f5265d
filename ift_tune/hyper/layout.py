"""Which weights of a model share a hyperparameter."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.errors import UsageError
from ift_tune.types import Tensors
from ift_tune.vectors import named

Per: TypeAlias = Literal["model", "tensor", "channel", "weight"]
"""What has one λ: the whole model, each parameter tensor, each output channel of each tensor (its
first dimension; of a bias and of a normalisation's scale every entry is a channel), or each
weight."""


class Layout:
    """The map between hyperparameters and the model's trainable tensors, in their order.

    λ has one tensor for each of the model's, of a shape that broadcasts to it: (), (C, 1, ..., 1)
    or its own. Where the whole model shares one λ, there is a single tensor of shape ().
    """

    def __init__(self, model: nn.Module, per: Per) -> None:
        """Remember the model, as a plain attribute: its weights are no hyperparameters.

        Raises:
            UsageError: If `per` is none of `Per`, or the model has nothing to train.
        """
        if per not in ("model", "tensor", "channel", "weight"):
            raise UsageError(f"per must be 'model', 'tensor', 'channel' or 'weight', got {per!r}")
        self.per = per
        self._model = model
        self._tensors = len(self._named())

    def _named(self) -> dict[str, Tensor]:
        return named(self._model, "the model")

    def weights(self) -> list[Tensor]:
        """Return what are the model's parameters now, also inside `torch.func.functional_call`.

        Raises:
            UsageError: If there are more or fewer tensors than there were.
        """
        weights = list(self._named().values())
        if self.per != "model" and len(weights) != self._tensors:
            raise UsageError(
                f"the model has {len(weights)} trainable tensors and had {self._tensors} when its "
                "decay was made: make it after freezing or adding layers"
            )
        return weights

    def names(self) -> list[str]:
        """Return what each tensor of λ belongs to: a parameter's name, or the model."""
        return ["the model"] if self.per == "model" else list(self._named())

    def empty(self) -> list[Tensor]:
        """Return tensors for λ, not filled, on the device and of the dtype of the weights."""
        weights = self.weights()
        return [w.new_empty(self._shape(w)) for w in weights[: 1 if self.per == "model" else None]]

    def expand(self, values: Tensors) -> list[Tensor]:
        """Return λ, or a function of it, for each tensor of weights, to which it broadcasts."""
        weights = self.weights()
        return list(values) * len(weights) if self.per == "model" else list(values)

    def reduce(self, products: Tensors) -> list[Tensor]:
        """Return the sums over the weights that share a λ: the adjoint of `expand`."""
        if self.per == "weight":
            return list(products)
        sums = [product.sum_to_size(self._shape(product)) for product in products]
        return [torch.stack(sums).sum()] if self.per == "model" else sums

    def _shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of the λ of one tensor of weights."""
        if self.per == "weight":
            return tuple(weight.shape)
        if self.per == "channel":
            return (*weight.shape[:1], *(1 for _ in weight.shape[1:]))
        return ()
