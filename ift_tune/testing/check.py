"""Is my problem's hypergradient right: three independent answers compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.base.status import SolveStatus
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
from ift_tune.problem.in_use import idle_parts, refuse_idle
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.frozen import FrozenProblem, Minimum, leaves_of

MAX_WEIGHTS = 3000


@dataclass(frozen=True)
class Comparison:
    """One comparison of the hypergradient with another way to get it.

    Attributes:
        name: What was compared.
        error: Relative error, ‖a − b‖/‖b‖.
        tolerance: The largest error that passes.
        note: What the comparison rests on.

    Example:
        >>> from ift_tune.testing import Comparison
        >>> Comparison("unrolling", error=1e-9, tolerance=1e-6).passed
        True
    """

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class CheckReport:
    """What `check_hypergradient` found.

    Attributes:
        comparisons: All of them, in order.
        weights: Number of weights P.
        hypers: Number of hyperparameters H.
        stationarity: ‖∂L_T/∂w‖ at the weights the check solved for.
        status: Of the Hessian there: anything but CONVERGED breaks the theorem's assumptions.

    Example:
        >>> from ift_tune.testing import CheckReport, Comparison
        >>> report = CheckReport([Comparison("unrolling", 1e-3, 1e-6)], weights=6, hypers=3)
        >>> report.passed
        False
        >>> print(report)
        6 weights, 3 hyperparameters, float64; inner problem re-solved to a gradient norm of 0.0e+00
          FAIL unrolling: relative error 1.0e-03 (at most 1e-06)
    """

    comparisons: list[Comparison] = field(default_factory=list)
    weights: int = 0
    hypers: int = 0
    stationarity: float = 0.0
    status: SolveStatus = SolveStatus.CONVERGED

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(c.passed for c in self.comparisons)

    def __str__(self) -> str:
        """Return a line for each comparison."""
        head = (
            f"{self.weights:,} weights, {self.hypers:,} hyperparameters, float64; inner problem "
            f"re-solved to a gradient norm of {self.stationarity:.1e}"
        )
        lines = [
            f"  {'ok  ' if c.passed else 'FAIL'} {c.name}: relative error {c.error:.1e} "
            f"(at most {c.tolerance:.0e}){'; ' + c.note if c.note else ''}"
            for c in self.comparisons
        ]
        if self.status is not SolveStatus.CONVERGED:
            lines.append(f"  note: {self.status.advice}")
        return "\n".join([head, *lines])


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
    augmentation), the inner problem is solved to stationarity. (In that mode running statistics are
    constants, in both losses.) There the implicit hypergradient with the dense inverse must agree
    with

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
    refuse_idle(idle_parts(frozen))
    minimum = frozen.minimised(frozen.present())
    frozen.move_to(minimum.weights)
    exact = frozen.hypergradient(Dense(max_weights=size))
    comparisons = [
        _finite_difference(frozen, minimum, exact, index, seed, epsilon, tolerance)
        for index in range(directions)
    ]
    comparisons.append(_unrolling(frozen, exact, unrolled_steps))
    comparisons += _penalty(frozen, seed)
    report = CheckReport(comparisons, size, count(frozen.hypers()), minimum.size, exact.status)
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
        first, second = (float(loss(weights).detach()) for _ in range(2))
        if first != second:
            raise UsageError(
                f"{name} gives {first} and then {second} on the same batch and weights: draw "
                "its random numbers from the global generators, which the check holds still"
            )


def _finite_difference(
    frozen: FrozenProblem,
    minimum: Minimum,
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
    ahead, behind = (_displaced(frozen, minimum, sign * epsilon, direction) for sign in (1.0, -1.0))
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


def _displaced(
    frozen: FrozenProblem, minimum: Minimum, distance: float, direction: Tensor
) -> float:
    """Return L_V(w*(λ + d), λ + d), and put λ back."""
    hypers = frozen.hypers()
    saved = [h.detach().clone() for h in hypers]
    try:
        with torch.no_grad():
            for hyper, piece in zip(hypers, unflatten(direction, hypers), strict=True):
                hyper.add_(piece, alpha=distance)
        solved = frozen.minimised(minimum.weights, minimum.inverse).weights
        return float(frozen.val_loss_at(solved).detach())
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
