"""Conjugate gradient on H + damping·I."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ift_tune.base.errors import require_integer, require_number
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator, damped
from ift_tune.implicit.inverse.base import Inverse, InverseResult, SolveStats, State, relative
from ift_tune.implicit.vectors import Tensors, axpy, dot, zeros_like


@dataclass(frozen=True)
class ConjugateGradient(Inverse):
    """q ≈ (H + damping·I)⁻¹v by conjugate gradient (Hestenes and Stiefel 1952) from q = 0.

    It stops at the tolerance, after `max_steps` products, or when a direction p has
    pᵀ(H + damping·I)p ≤ 0: then the matrix is not positive definite, the status says so, and the
    iterate before that direction is returned (zero if it was the first).

    Attributes:
        max_steps: Most products to spend, at least 1.
        tolerance: Relative residual at which to stop, above 0.
        damping: Added to the diagonal, at least 0; about the size of the most negative eigenvalue
            makes an indefinite Hessian solvable.

    Raises:
        UsageError: If a value is out of range.
    """

    name: ClassVar[str] = "conjugate_gradient"
    linear: ClassVar[bool] = False

    max_steps: int = 20
    tolerance: float = 1e-5
    damping: float = 0.0

    def __post_init__(self) -> None:
        require_integer("max_steps", self.max_steps, 1)
        require_number("tolerance", self.tolerance, above=0.0)
        require_number("damping", self.damping, least=0.0)

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return `max_steps`."""
        return self.max_steps

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        """Add the damping."""
        return State(damped(operator, self.damping))

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        """Iterate; the residual reported is that of the recurrence."""
        solution, residual, direction = zeros_like(vector), list(vector), list(vector)
        squared = float(dot(residual, residual))
        goal = (self.tolerance * length) ** 2
        largest = 0.0
        status = SolveStatus.CONVERGED if squared <= goal else SolveStatus.TRUNCATED
        for _ in range(self.max_steps if squared > goal else 0):
            product = state.operator.matvec(direction)
            curvature = float(dot(direction, product))
            if not math.isfinite(curvature):
                status = SolveStatus.NONFINITE
                break
            if curvature <= 0.0:
                status = SolveStatus.NEGATIVE_CURVATURE
                break
            largest = max(largest, curvature / float(dot(direction, direction)))
            step = squared / curvature
            solution = axpy(solution, step, direction)
            residual = axpy(residual, -step, product)
            before, squared = squared, float(dot(residual, residual))
            if squared <= goal:
                status = SolveStatus.CONVERGED
                break
            direction = axpy(residual, squared / before, direction)
        if not math.isfinite(length):
            status = SolveStatus.NONFINITE
        residual_norm = math.sqrt(squared)
        stats = SolveStats(
            residual_norm=residual_norm,
            relative_residual=relative(residual_norm, length),
            largest_eigenvalue=largest or None,
        )
        return InverseResult(solution, status, stats)
