"""The hypergradient by differentiating through the last steps of gradient descent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.hypergradient import Hypergradient, WarmStart
from ift_tune.implicit.inverse import SolveStats
from ift_tune.implicit.vectors import TensorSource, fill_missing, named


@dataclass(frozen=True)
class UnrolledHypergradient(Hypergradient):
    """A `Hypergradient` with the weights that the unrolled steps arrived at, detached."""

    weights: list[Tensor]


def unrolled_hypergradient(
    train_loss: Callable[[list[Tensor]], Tensor],
    val_loss: Callable[[list[Tensor]], Tensor],
    weights: TensorSource,
    hypers: TensorSource,
    *,
    steps: int,
    lr: float,
) -> UnrolledHypergradient:
    """Return dL_V(w_k)/dλ through w_{i+1} = w_i − lr·∂L_T/∂w(w_i, λ), i < k, from the given w_0.

    Keeps k iterates in memory. From w_0 = w*(λ), k steps equal ``Neumann(terms=k-1, alpha=lr)``
    exactly (Lorraine, Vicol, Duvenaud 2020, section 4): the relation between the implicit
    function theorem and differentiating through optimisation.

    Args:
        train_loss: L_T as a function of a list of weight tensors, the penalty included.
        val_loss: L_V as a function of a list of weight tensors.
        weights: w_0; never modified.
        hypers: λ, the tensors the two functions read.
        steps: k, at least 1.
        lr: Step size of gradient descent, above 0.

    Returns:
        The gradients, zero for a hyperparameter without influence, and the final weights;
        `stats.hvps` counts one product a step.

    Raises:
        UsageError: If `steps` or `lr` is out of range, or `val_loss` ignores the weights.

    Example:
        >>> import torch, ift_tune
        >>> decay = torch.tensor([0.5], requires_grad=True)
        >>> result = ift_tune.unrolled_hypergradient(
        ...     lambda w: ((w[0] - 3.0) ** 2 + decay * w[0] ** 2).sum(),
        ...     lambda w: ((w[0] - 1.0) ** 2).sum(),
        ...     [torch.tensor([2.0], requires_grad=True)],  # the minimum, 3/(1 + decay)
        ...     [decay],
        ...     steps=20,
        ...     lr=0.2,
        ... )
        >>> result.grads, result.weights  # as by the implicit function theorem
        ([tensor([-2.6667])], [tensor([2.])])
    """
    if steps < 1 or not lr > 0.0:
        raise UsageError(f"unrolling needs steps >= 1 and lr > 0, got steps={steps}, lr={lr}")
    started = time.perf_counter()
    h = list(named(hypers, "hypers").values())
    # New leaves: the caller's weights are constants here, and get no gradient.
    iterate = [w.detach().requires_grad_() for w in named(weights, "weights").values()]
    with torch.enable_grad():
        for _ in range(steps):
            last_train = train_loss(iterate)
            # With its graph: the step itself is differentiated, which is where H and ∂²L_T/∂w∂λ
            # come in, one factor (I − lr·H) a step.
            slopes = torch.autograd.grad(last_train, iterate, create_graph=True, allow_unused=True)
            iterate = [w if g is None else w - lr * g for w, g in zip(iterate, slopes, strict=True)]
        last_val = val_loss(iterate)
        if not last_val.requires_grad:
            raise UsageError("val_loss must depend on the list of weights that it is given")
        grads = fill_missing(torch.autograd.grad(last_val, h, allow_unused=True), h)
    finite = all(bool(torch.isfinite(g).all()) for g in grads)
    return UnrolledHypergradient(
        grads=grads,
        status=SolveStatus.TRUNCATED if finite else SolveStatus.NONFINITE,
        stats=SolveStats(hvps=steps, alpha=lr, seconds=time.perf_counter() - started),
        train_loss=last_train.detach(),
        val_loss=last_val.detach(),
        warm=WarmStart(),
        weights=[w.detach() for w in iterate],
    )
