"""Solving a small inner problem to stationarity: the ground under finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ift_tune.curvature import Hessian
from ift_tune.errors import UsageError
from ift_tune.types import Tensors
from ift_tune.vectors import count, fill_missing, flatten, unflatten

_STATIONARY = 1e-10  # gradient norm, relative to 1 + |loss|
_LBFGS_STEPS = 500
_NEWTON_STEPS = 30


def minimise(loss: Callable[[list[Tensor]], Tensor], start: Tensors) -> tuple[list[Tensor], float]:
    """Return weights where the gradient of `loss` vanishes, and its norm there.

    L-BFGS finds the basin, Newton's method with the dense Hessian the last digits.

    Raises:
        UsageError: If the gradient does not get small, as for a loss without a minimum.
    """
    weights = [w.detach().clone().requires_grad_() for w in start]
    if _gradient_norm(loss, weights) > 1e-6:
        _lbfgs(loss, weights)
    size = float("inf")
    for _ in range(_NEWTON_STEPS):
        value = loss(weights)
        raw = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
        flat = flatten([g.detach() for g in fill_missing(raw, weights)])
        size = float(torch.linalg.vector_norm(flat))
        if size <= _STATIONARY * (1.0 + abs(float(value.detach()))):
            return [w.detach() for w in weights], size
        step = _newton_step(Hessian(raw, weights).dense(), flat)
        with torch.no_grad():
            for weight, piece in zip(weights, unflatten(step, weights), strict=True):
                weight.sub_(piece)
    raise UsageError(
        f"the training loss has no stationary point that {_LBFGS_STEPS} L-BFGS and "
        f"{_NEWTON_STEPS} Newton steps reach (gradient norm {size:.1e} over {count(weights)} "
        "weights): the implicit function theorem needs one; add a weight decay"
    )


def _newton_step(hessian: Tensor, gradient: Tensor) -> Tensor:
    """Return H⁺·g with |eigenvalues|, so that saddle points repel; flat directions stay."""
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
    cutoff = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    keep = values.abs() > cutoff
    basis = vectors[:, keep]
    step: Tensor = basis @ ((basis.T @ gradient) / values[keep].abs())
    return step


def _lbfgs(loss: Callable[[list[Tensor]], Tensor], weights: list[Tensor]) -> None:
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
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()


def _gradient_norm(loss: Callable[[list[Tensor]], Tensor], weights: list[Tensor]) -> float:
    grads = torch.autograd.grad(loss(weights), weights, allow_unused=True)
    return float(torch.linalg.vector_norm(flatten(fill_missing(grads, weights))))
