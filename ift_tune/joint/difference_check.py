"""What can be checked at the start where products are differences: the losses, and the accuracy.

There is no second derivative to hold against anything. But products by differences rest on a loss
that repeats and on a gradient that is the loss's own, and both can be looked at; and a product over
one step, held against that over twice the step, tells how far either may be from the truth: what
rounding has spoilt of it halves, what curvature beyond the second order has spoilt quadruples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ift_tune.base.errors import StartCheckError, UnreachableHyperparameterError, UsageError
from ift_tune.implicit.differences import Differences, displaced
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import (
    Tensors,
    axpy,
    dot,
    fill_missing,
    mul,
    norm,
    randn_like,
    relative_error,
)
from ift_tune.joint.cost import FORWARD, GRADIENT
from ift_tune.joint.start_check import INSTEAD, StartCheck, require_same
from ift_tune.problem.batches import Batch
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.padding import without_padding
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size

_COARSE = 0.05  # relative: what exact products are allowed to be off by in their own check
_NOISE = 1.0  # of two products with nothing in common
_SLOPE = 0.05  # relative error of a gradient that is taken for another
_LONGER = 2.0


def check_differences(
    problem: BilevelProblem,
    linearisation: Linearisation,
    train_batch: Batch,
    val_batch: Batch,
    redrawn: Callable[[], AbstractContextManager[None]],
) -> StartCheck:
    """Check what products by differences rest on, and how accurate they are.

    Args:
        problem: At the weights and λ of `linearisation`, and as before afterwards.
        linearisation: Of these batches, by differences.
        train_batch: Of the training loss.
        val_batch: Of the validation loss.
        redrawn: A context in which the losses draw the random numbers of the linearisation again.

    Returns:
        What it cost, and how far two products of different steps are apart.

    Raises:
        StartCheckError: If a loss differs on repetition, its gradient is not that of the loss, or
            products are noise.
        UnreachableHyperparameterError: If a hyperparameter adds to the training loss something that
            no weight has a part in.
    """
    source = linearisation.source
    if not isinstance(source, Differences):
        raise UsageError(
            'products by differences are checked here: linearise with products="difference", got '
            f"{type(source).__name__}"
        )
    weights = linearisation.weights
    passes, rounding = source.passes, source.machine
    acting = [h for n, h in linearisation.hypers.items() if n in (linearisation.acting or ())]
    loss, slope = passes.slope([*weights, *acting])
    require_same("train_loss", linearisation.train_loss, float(loss), 100.0 * rounding)
    with redrawn(), torch.no_grad(), evaluating(problem.model), preserved_buffers(problem.model):
        again = problem.val_loss(val_batch)
    require_same("val_loss", linearisation.val_loss, float(again), 100.0 * rounding)
    random = without_padding(problem.model, weights, randn_like(weights, 0))
    gradient = fill_missing(tuple(slope[: len(weights)]), weights)
    _compare_loss(source, weights, random, gradient, loss)

    # Along what the solve begins with: in another direction the curvature may be another by far.
    direction = linearisation.vector
    if float(norm(direction)) == 0.0:
        direction = random
    inputs = [*weights, *acting]
    with linearisation.kernels.active():
        near = fill_missing(tuple(source.products(inputs, direction)), inputs)
        far = fill_missing(tuple(source.products(inputs, direction, longer=_LONGER)), inputs)
    n = len(weights)
    _require_mixed(linearisation, acting, near[n:], slope[n:])
    errors = [
        relative_error(far[part], near[part]) if float(norm(near[part])) > 0.0 else 0.0
        for part in (slice(n), slice(n, None))
        if near[part]
    ]
    error = max(errors, default=0.0)
    if not error <= _NOISE:
        raise StartCheckError(
            "products by differences are rounding errors here: compute the training loss in "
            'float32, without autocast, or set products="exact", '
            f"{INSTEAD}, got products over two steps that differ by {100.0 * error:.0f} %"
        )
    train, val = (as_size(problem.batch_size(b)) for b in (train_batch, val_batch))
    cost = 5 * GRADIENT + FORWARD * (2.0 + (val / train if train else 0.0))
    status = "passed" if error <= _COARSE else "coarse"
    return StartCheck(status, cost, error, source.kinks, "difference")


def _compare_loss(
    source: Differences, weights: Tensors, random: Tensors, slope: Tensors, loss: Tensor
) -> None:
    """Hold the gradient against the loss, along itself and a random direction at once.

    Raises:
        StartCheckError: If it is the gradient of something else.
    """
    length = float(norm(slope))
    direction = mul(random, 1.0 / float(norm(random)))
    if 0.0 < length < math.inf:
        direction = axpy(direction, 1.0 / length, slope)
    # Of the loss itself, which is rounded once: a longer way than a gradient's is better.
    step = source.step_along(direction, longer=5.0)
    with displaced(weights) as move:
        move(direction, step, 1.0)
        ahead = source.passes.value()
        move(direction, step, -1.0)
        behind = source.passes.value()
    change, expected = float(ahead - behind), float(2.0 * step * dot(slope, direction))
    noise = 20.0 * source.machine * abs(float(loss))
    bent = abs(float(ahead + behind - 2.0 * loss))  # by curvature, and at kinks
    if not abs(change - expected) <= _SLOPE * abs(change) + noise + 0.25 * bent:
        raise StartCheckError(
            "the gradient of the training loss is not its derivative: look for gradient hooks, "
            "for custom functions with another's backward, and for .detach() or .data of what "
            f"depends on the weights; {INSTEAD}, got a loss that changes by {change:.3g} where "
            f"its gradient says {expected:.3g}"
        )


def _require_mixed(
    linearisation: Linearisation,
    acting: Tensors,
    mixed: Tensors,
    slopes: list[Tensor | None],
) -> None:
    """Refuse λ that changes the loss but none of its gradient, as a term by itself does.

    Raises:
        UnreachableHyperparameterError: If there is one; it is named.
    """
    names = {id(h): name for name, h in linearisation.hypers.items()}
    closed = {id(h) for h in (linearisation.penalty.hypers if linearisation.penalty else [])}
    idle = [
        names[id(h)]
        for h, product, slope in zip(acting, mixed, slopes, strict=True)
        if not bool(product.any())
        and slope is not None
        and bool(slope.any())
        and id(h) not in closed
        and names[id(h)] not in linearisation.judging
    ]
    if idle:
        raise UnreachableHyperparameterError(idle)
