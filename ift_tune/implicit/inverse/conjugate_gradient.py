"""Conjugate gradient on H + damping·I."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from typing_extensions import Self

from ift_tune.base.arguments import take_plain
from ift_tune.base.errors import require_integer, require_number
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator, damped
from ift_tune.implicit.inverse.base import Inverse, InverseResult, SolveStats, State, relative
from ift_tune.implicit.preconditioner import (
    DiagonalPreconditioner,
    NoPreconditioner,
    Preconditioner,
    require_preconditioner,
)
from ift_tune.implicit.vectors import Tensors, axpy, dot, norm, zeros_like

_BETTER = 0.99  # of a squared residual: progress, and not the rounding of one that stands still


@dataclass(frozen=True)
class ConjugateGradient(Inverse[State]):
    """q ≈ (H + damping·I)⁻¹v by conjugate gradient (Hestenes and Stiefel 1952) from q = 0.

    It stops at the tolerance, after `max_steps` products, or when a direction p has
    pᵀ(H + damping·I)p ≤ 0: then the matrix is not positive definite, the status says so, and the
    iterate before that direction is returned (zero if it was the first). Where the curvature is 0
    to rounding the status is SINGULAR, and the iterate with the least residual is returned: those
    after it have gone ever farther for nothing. One product more measures the true residual, which
    decides the status.

    Attributes:
        max_steps: Most products to spend, at least 1.
        tolerance: Relative residual at which to stop, above 0.
        damping: Added to the diagonal, at least 0; about the size of the most negative eigenvalue
            makes an indefinite Hessian solvable.
        preconditioner: M, near H + damping·I; residuals are then measured as √(rᵀM⁻¹r).

    Raises:
        UsageError: If a value is out of range.

    Example:
        >>> import torch
        >>> from ift_tune import ConjugateGradient, hypergradient
        >>> w, decay = (torch.tensor([x], requires_grad=True) for x in (2.0, 4.0))
        >>> train, val = (decay * w.square()).sum(), w.sum()  # H = 2·decay = 8
        >>> result = hypergradient(train, val, [w], [decay], inverse=ConjugateGradient())
        >>> result.grads, result.status.value, result.stats.hvps  # −v·H⁻¹·2w
        ([tensor([-0.5000])], 'converged', 2)
    """

    name: ClassVar[str] = "conjugate_gradient"
    summary: ClassVar[str] = "the fewest products for a residual, where H is positive definite"
    linear: ClassVar[bool] = False  # the steps depend on v: αₖ = rₖᵀzₖ / pₖᵀHpₖ
    measured: ClassVar[Literal["always", "claimed", "never"]] = "always"
    steps_field: ClassVar[str | None] = "max_steps"
    full_length: ClassVar[Mapping[str, float]] = {"tolerance": 1e-14}

    max_steps: int = 20
    tolerance: float = 1e-5
    damping: float = 0.0
    preconditioner: Preconditioner = field(default_factory=NoPreconditioner)

    def __post_init__(self) -> None:
        take_plain(self)
        require_integer("max_steps", self.max_steps, 1)
        require_number("tolerance", self.tolerance, above=0.0)
        require_number("damping", self.damping, least=0.0)
        require_preconditioner(self.preconditioner)

    @classmethod
    def examples(cls) -> list[Self]:
        """Return short, long and damped ones, with M and without."""
        return [
            cls(),
            cls(max_steps=3),
            cls(max_steps=50, damping=0.1),
            cls(max_steps=200, tolerance=1e-13),
            cls(max_steps=200, tolerance=1e-13, preconditioner=DiagonalPreconditioner(probes=1)),
            cls(max_steps=3, damping=0.1, preconditioner=DiagonalPreconditioner()),
        ]

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return `max_steps`, and the preconditioner's."""
        return self.max_steps + self.preconditioner.max_hvps()

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        """Add the damping, of which the preconditioner knows."""
        operator = damped(operator, self.damping)
        return State(operator, precondition=self.preconditioner.near(operator))

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        """Iterate by the recurrence's residual; the true one is taken at the end, by `solve`."""
        solution, residual = zeros_like(vector), vector
        # z = M⁻¹r, and p and Mp by the same recurrence, so that M is never needed. Without an M,
        # z is r and Mp is p.
        image = direction = state.precondition(residual)
        dual = residual
        squared = float(dot(residual, image))
        goal = (self.tolerance * length) ** 2
        largest, rounding = 0.0, state.operator.rounding
        best, least = solution, squared
        status = SolveStatus.CONVERGED if squared <= goal else SolveStatus.TRUNCATED
        for _ in range(self.max_steps if squared > goal else 0):
            product = state.operator.matvec(direction)
            curvature = float(dot(direction, product))
            if not math.isfinite(curvature):
                status = SolveStatus.NONFINITE
                break
            across = float(dot(direction, dual))  # pᵀMp
            largest = max(largest, curvature / across)  # ≤ λ_max
            # What rounding leaves of a curvature that is 0: of the inner product's terms, and of
            # the product, which is as exact as H is large.
            lengths = float(norm(direction) * norm(product))
            nothing = rounding * max(lengths, largest * across)
            if curvature <= nothing:
                negative = curvature < -nothing
                status = SolveStatus.NEGATIVE_CURVATURE if negative else SolveStatus.SINGULAR
                if not negative:  # the last steps have gone far along it, and made nothing better
                    solution, squared = best, least
                break
            step = squared / curvature
            solution = axpy(solution, step, direction)
            residual = axpy(residual, -step, product)
            image = state.precondition(residual)
            before, squared = squared, float(dot(residual, image))
            if squared < _BETTER * least:
                best, least = solution, squared
            if squared <= goal:
                status = SolveStatus.CONVERGED
                break
            plain = image is residual
            direction = axpy(image, squared / before, direction)
            dual = direction if plain else axpy(residual, squared / before, dual)
        if not math.isfinite(length):
            status = SolveStatus.NONFINITE
        residual_norm = math.sqrt(max(squared, 0.0))
        stats = SolveStats(
            residual_norm=residual_norm,
            relative_residual=relative(residual_norm, length),
            largest_eigenvalue=largest or None,
        )
        return InverseResult(solution, status, stats)
