"""Solving a small inner problem to stationarity: the ground under finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.curvature import Hessian
from ift_tune.implicit.vectors import Tensors, axpy, count, fill_missing, flatten, unflatten

Loss: TypeAlias = Callable[[list[Tensor]], Tensor]

_STATIONARY = 1e-10  # gradient norm, relative to 1 + |loss|
_LBFGS_STEPS = 500
_NEWTON_STEPS = 50
_HALVINGS = 20


def minimise(loss: Loss, start: Tensors) -> tuple[list[Tensor], float]:
    """Return weights where the gradient of `loss` vanishes, and its norm there.

    L-BFGS finds the basin, Newton's method with the dense Hessian and backtracking the last digits.

    Raises:
        UsageError: If the gradient does not get small, as for a loss without a minimum.
    """
    weights = leaves_of(start)
    # A displaced λ starts next to its minimum, where Newton's method alone is quicker.
    if float(torch.linalg.vector_norm(_gradient(loss, weights)[1])) > 1e-6:
        _lbfgs(loss, weights)
    for _ in range(_NEWTON_STEPS):
        value, flat = _gradient(loss, weights)
        size = float(torch.linalg.vector_norm(flat))
        if size <= _STATIONARY * (1.0 + abs(value)):
            return [w.detach() for w in weights], size
        following = _backtrack(loss, weights, _newton_step(loss, weights, flat), value, size)
        if following is None:
            break
        weights = following
    raise UsageError(
        f"the training loss has no stationary point that L-BFGS and Newton's method reach "
        f"(gradient norm {size:.1e} over {count(weights)} weights), and the implicit function "
        "theorem needs one: add a weight decay where the loss has no minimum, and check the "
        "problem with smooth operations where it has kinks (ELU for ReLU, average for max pooling)"
    )


def _newton_step(loss: Loss, weights: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return |H|⁺·g: saddle points repel, flat directions stay."""
    raw = torch.autograd.grad(loss(weights), weights, create_graph=True, allow_unused=True)
    hessian = Hessian(raw, weights).dense()
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
    # |H|, or a saddle point would attract; and H⁺, for a flat direction (as of logits that all move
    # alike) has no step.
    cutoff = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    basis, scales = vectors[:, values.abs() > cutoff], values[values.abs() > cutoff].abs()
    return unflatten(basis @ ((basis.T @ gradient) / scales), weights)


def _backtrack(
    loss: Loss, weights: list[Tensor], step: Tensors, value: float, size: float
) -> list[Tensor] | None:
    """Return the first of w − s, w − s/2, ... with a lower loss or a smaller gradient."""
    for halving in range(_HALVINGS):
        tried = leaves_of(axpy([w.detach() for w in weights], -(0.5**halving), step))
        new_value, gradient = _gradient(loss, tried)
        # At the last digits the loss has stopped to change, and only its gradient still tells.
        if new_value < value or float(torch.linalg.vector_norm(gradient)) < size:
            return tried
    return None


def _lbfgs(loss: Loss, weights: list[Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        weights,
        max_iter=_LBFGS_STEPS,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward(inputs=weights)  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()


def _gradient(loss: Loss, weights: list[Tensor]) -> tuple[float, Tensor]:
    value = loss(weights)
    grads = torch.autograd.grad(value, weights, allow_unused=True)
    return float(value.detach()), flatten(fill_missing(grads, weights))


def leaves_of(weights: Tensors) -> list[Tensor]:
    """Return detached copies that require gradients."""
    return [w.detach().clone().requires_grad_() for w in weights]
