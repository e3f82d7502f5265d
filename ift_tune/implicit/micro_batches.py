"""Exact products part by part: the graph of a gradient is that of one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ift_tune.implicit.curvature import GaussNewton
from ift_tune.implicit.double_backward import partial_vjp
from ift_tune.implicit.hidden_curvature import refuse_hidden_curvature
from ift_tune.implicit.vectors import Tensors
from ift_tune.implicit.vectors import precision as rounding_of

Consume = Callable[[Tensor, list[Tensor]], None]
"""Takes a part's share of the training loss with its graph, and the model's outputs if asked."""


class Parts(Protocol):
    """A training loss as a sum over parts of its batch, to be run again."""

    def run(self, consume: Consume, *, outputs: bool = False) -> None:
        """Compute each part's share of the loss and hand it on, one after the other."""


class MicroBatches:
    """Exact second derivatives of a sum of losses, with one term's graph in memory at a time.

    Attributes:
        rounding: The relative error of a product, about.
    """

    def __init__(self, parts: Parts, weights: Tensors, *, gauss_newton: bool = False) -> None:
        """Take the loss.

        Args:
            parts: Of the training loss, on kernels that can be differentiated twice.
            weights: What it is differentiated by.
            gauss_newton: Whether the Gauss-Newton matrix takes the Hessian's place.
        """
        self._parts, self._weights, self._gauss_newton = parts, list(weights), gauss_newton
        self.rounding = rounding_of(weights)

    def gradient(self, inputs: Tensors) -> list[Tensor | None]:
        """Return ∂L_T/∂inputs, None where nothing is reached."""
        total: list[Tensor | None] = [None] * len(inputs)

        def consume(loss: Tensor, _outputs: list[Tensor]) -> None:
            accumulate_(total, torch.autograd.grad(loss, list(inputs), allow_unused=True))

        self._parts.run(consume)
        return total

    def products(self, inputs: Tensors, vector: Tensors) -> list[Tensor | None]:
        """Return vᵀ·∂²L_T/∂w∂inputsᵀ, None where nothing is reached."""
        total: list[Tensor | None] = [None] * len(inputs)

        def consume(loss: Tensor, _outputs: list[Tensor]) -> None:
            refuse_hidden_curvature(loss)
            gradient = torch.autograd.grad(
                loss, self._weights, create_graph=True, allow_unused=True
            )
            curved = [
                (g, v)
                for g, v in zip(gradient, vector, strict=True)
                if g is not None and g.requires_grad
            ]
            outputs, along = [g for g, _ in curved], [v for _, v in curved]
            accumulate_(total, partial_vjp(outputs, inputs, along))

        self._parts.run(consume)
        return total

    def curvature(self, vector: Tensors) -> list[Tensor | None]:
        """Return the product with the Hessian, or with the Gauss-Newton matrix in its place."""
        if not self._gauss_newton:
            return self.products(self._weights, vector)
        total: list[Tensor | None] = [None] * len(self._weights)

        def consume(loss: Tensor, outputs: list[Tensor]) -> None:
            accumulate_(total, GaussNewton(loss, outputs[0], self._weights).matvec(vector))

        self._parts.run(consume, outputs=True)
        return total


def accumulate_(total: list[Tensor | None], parts: Tensors | tuple[Tensor | None, ...]) -> None:
    """Add to a sum in place, where None stands for nothing."""
    for i, part in enumerate(parts):
        if part is None:
            continue
        part = part.to_dense() if part.layout is not torch.strided else part
        before = total[i]
        # A gradient may be a view of another, or of what is expanded: nothing is added into that.
        total[i] = part if before is None else before + part
