"""Is my problem's hypergradient right: three independent answers compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.implicit.double_backward import vjp
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.inverse import Dense, Neumann
from ift_tune.implicit.vectors import (
    Tensors,
    count,
    fill_missing,
    flatten,
    randn_like,
    relative_error,
    unflatten,
    zeros_like,
)
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.frozen import FrozenProblem
from ift_tune.testing.minimise import leaves_of
from ift_tune.testing.report import CheckReport, Comparison

MAX_WEIGHTS = 3000


def check_hypergradient(
    problem: BilevelProblem,
    *,
    directions: int = 3,
    unrolled_steps: int = 10,
    epsilon: float = 1e-4,
    tolerance: float = 1e-4,
    max_weights: int = MAX_WEIGHTS,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> CheckReport:
    """Compare a problem's hypergradient with three independent answers, in float64.

    On a copy of the problem, in evaluation mode, with the first batch of the curvature (or train)
    and val loaders and the same random numbers in every loss (for learned dropout and
    augmentation), the inner problem is solved to stationarity. There the implicit hypergradient
    with the dense inverse must agree with

    1. central finite differences of L_V(w*(λ), λ) along random directions, with the inner problem
       *re-solved* at every displaced λ;
    2. differentiation through `unrolled_steps` steps of gradient descent, which must equal the
       Neumann series of one term less;
    3. a penalty in closed form must agree with autograd through its `value`.

    Nothing is made smaller without being said: a problem that is too large is refused.

    Args:
        problem: Not modified.
        directions: Random directions for the finite differences, at least 1.
        unrolled_steps: k, at least 1.
        epsilon: Size of the displacement of λ along a unit direction.
        tolerance: Largest relative error of the finite differences.
        max_weights: Refuse more weights than this: the dense inverse is O(P³).
        seed: Of the directions.
        raise_on_failure: Whether a failed comparison raises; else look at ``report.passed``.

    Returns:
        The report; printing it shows a line for each comparison.

    Raises:
        CheckFailedError: If a comparison fails, with the report as its text.
        UsageError: If the problem is incomplete, too large, random, or has no stationary point.
        DoubleBackwardError: If an operation has no second derivative; it is named.
        UnreachableHyperparameterError: If a hyperparameter does not reach the training loss.

    Example:
        >>> import ift_tune
        >>> report = ift_tune.testing.check_hypergradient(ift_tune.testing.Quadratic())
        >>> report.passed, report.weights, report.hypers
        (True, 6, 3)
        >>> report.comparisons[-1].name
        '10 unrolled steps against Neumann with K = 9'
    """
    problem.validate()
    size = count(problem.weights())
    if size > max_weights:
        raise UsageError(
            f"the check needs the dense inverse of a {size:,} × {size:,} Hessian: build the same "
            f"problem with a smaller model (at most {max_weights:,} weights), or raise max_weights"
        )
    if directions < 1 or unrolled_steps < 1:
        raise UsageError("directions and unrolled_steps must be at least 1")
    frozen = FrozenProblem(problem, seed=seed)
    _refuse_randomness(frozen)
    weights, stationarity = frozen.minimised(frozen.present())
    frozen.move_to(weights)
    exact = frozen.hypergradient(Dense(max_weights=size))
    comparisons = [
        _finite_difference(frozen, exact, index, seed, epsilon, tolerance)
        for index in range(directions)
    ]
    comparisons.append(_unrolling(frozen, exact, unrolled_steps))
    comparisons += _penalty(frozen, seed)
    report = CheckReport(comparisons, size, count(frozen.hypers()), stationarity, exact.status)
    if raise_on_failure and not report.passed:
        raise CheckFailedError(f"the hypergradient is not the true one\n{report}")
    return report


def _refuse_randomness(frozen: FrozenProblem) -> None:
    weights = frozen.weights()
    losses: dict[str, Callable[[Tensors], Tensor]] = {
        "train_loss": frozen.train_loss_at,
        "val_loss": frozen.val_loss_at,
    }
    for name, loss in losses.items():
        with torch.no_grad():
            first, second = float(loss(weights)), float(loss(weights))
        if first != second:
            raise UsageError(
                f"{name} gives {first} and then {second} on the same batch and weights: draw "
                "its random numbers from the global generators, which the check holds still"
            )


def _finite_difference(
    frozen: FrozenProblem,
    exact: Hypergradient,
    index: int,
    seed: int,
    epsilon: float,
    tolerance: float,
) -> Comparison:
    """Compare the slope along a random direction with that of the re-solved problem."""
    direction = flatten(randn_like(frozen.hypers(), seed + index))
    direction = direction / torch.linalg.vector_norm(direction)
    # Central: the error is O(ε²), and with ε = 1e-4 well above what float64 cancels.
    ahead, behind = (_displaced(frozen, sign * epsilon, direction) for sign in (1.0, -1.0))
    slope = (ahead - behind) / (2.0 * epsilon)
    # Relative to the whole gradient's typical slope: a direction may happen to be flat.
    flat = flatten(exact.grads)
    typical = float(torch.linalg.vector_norm(flat)) / len(flat) ** 0.5
    scale = max(abs(slope), typical, 1e-12)
    return Comparison(
        f"finite differences, direction {index + 1}",
        abs(float(flat @ direction) - slope) / scale,
        tolerance,
        f"slope {slope:.3e}",
    )


def _displaced(frozen: FrozenProblem, distance: float, direction: Tensor) -> float:
    """Return L_V(w*(λ + d), λ + d), and put λ back."""
    hypers = frozen.hypers()
    saved = [h.detach().clone() for h in hypers]
    try:
        with torch.no_grad():
            for hyper, piece in zip(hypers, unflatten(direction, hypers), strict=True):
                hyper.add_(piece, alpha=distance)
        solved, _ = frozen.minimised(frozen.present())
        with torch.no_grad():
            return float(frozen.val_loss_at(solved))
    finally:
        with torch.no_grad():
            for hyper, value in zip(hypers, saved, strict=True):
                hyper.copy_(value)


def _unrolling(frozen: FrozenProblem, exact: Hypergradient, steps: int) -> Comparison:
    """Compare k unrolled steps from w* with Neumann's K = k − 1 (see `unrolled_hypergradient`)."""
    largest = exact.stats.largest_eigenvalue or 1.0
    alpha = 1.0 / max(abs(largest), 1e-12)
    unrolled = frozen.unrolled(steps, alpha)
    series = frozen.hypergradient(Neumann(terms=steps - 1, alpha=alpha))
    return Comparison(
        f"{steps} unrolled steps against Neumann with K = {steps - 1}",
        relative_error(series.grads, unrolled.grads),
        1e-6,
        "from the stationary point",
    )


def _penalty(frozen: FrozenProblem, seed: int) -> list[Comparison]:
    """Compare a closed-form penalty with autograd through its value."""
    penalty = frozen.penalty()
    if penalty is None:
        return []
    leaves = leaves_of(frozen.weights())
    vector = randn_like(leaves, seed)
    raw = torch.autograd.grad(penalty.value(leaves), leaves, create_graph=True, allow_unused=True)
    curved = [(g, v) for g, v in zip(raw, vector, strict=True) if g is not None]
    inputs = [*leaves, *penalty.hypers]
    truth = vjp([g for g, _ in curved], inputs, [v for _, v in curved])
    closed = zeros_like(leaves)
    penalty.add_gradient_(closed, leaves)
    n = len(leaves)
    pairs = {
        "gradient": (closed, fill_missing(raw, leaves)),
        "Hessian product": (penalty.hvp(leaves, vector), truth[:n]),
        "mixed product": (penalty.mixed(leaves, vector), truth[n:]),
    }
    return [
        Comparison(f"closed-form penalty, {name}", relative_error(mine, theirs), 1e-9)
        for name, (mine, theirs) in pairs.items()
    ]
