"""Conjugate gradient on H + damping·I."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ift_tune.base.arguments import known_keywords, take_plain
from ift_tune.base.errors import require_integer, require_number
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator, damped
from ift_tune.implicit.inverse.base import (
    Inverse,
    InverseResult,
    SolveStats,
    State,
    Unread,
    relative,
)
from ift_tune.implicit.preconditioner import (
    DiagonalPreconditioner,
    NoPreconditioner,
    Preconditioner,
    require_preconditioner,
)
from ift_tune.implicit.reading import Later, choose
from ift_tune.implicit.vectors import Tensors, axpy, dot, norm, zeros_like

_BETTER = 0.99  # of a squared residual: progress, and not the rounding of one that stands still


@known_keywords()
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
    waits: ClassVar[bool] = False
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

    def max_further_hvps(self, weights: int) -> int:
        """Return `max_steps`."""
        return self.max_steps

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        """Add the damping, of which the preconditioner knows."""
        operator = damped(operator, self.damping)
        return State(operator, precondition=self.preconditioner.near(operator))

    def _solve(self, state: State, vector: Tensors, length: Tensor) -> Unread:
        """Iterate by the recurrence's residual; the true one is taken at the end, by `solve`."""
        solution: Tensors = zeros_like(vector)
        residual = vector
        # z = M⁻¹r, and p and Mp by the same recurrence, so that M is never needed. Without an M,
        # z is r and Mp is p.
        image = direction = state.precondition(residual)
        dual = residual
        squared = dot(residual, image).double()
        goal = (self.tolerance * length).square()
        largest, rounding = torch.zeros_like(squared), state.operator.rounding
        best, least = solution, squared
        code = torch.where(squared <= goal, _CONVERGED, _TRUNCATED)
        alive = squared > goal
        for step_number in range(self.max_steps):
            if _looks(step_number, alive) and not bool(alive):
                break
            product = state.operator.matvec(direction)
            curvature = dot(direction, product).double()
            across = dot(direction, dual).double()  # pᵀMp
            known = alive & curvature.isfinite()
            quotient = curvature / across
            largest = torch.where(known & (quotient > largest), quotient, largest)  # ≤ λ_max
            # What rounding leaves of a curvature that is 0: of the inner product's terms, and of
            # the product, which is as exact as H is large.
            lengths = (norm(direction) * norm(product)).double()
            nothing = rounding * torch.maximum(lengths, largest * across)
            flat = known & (curvature <= nothing)
            negative = flat & (curvature < -nothing)
            code = torch.where(alive & ~known, _NONFINITE, code)
            code = torch.where(flat, torch.where(negative, _NEGATIVE, _SINGULAR), code)
            # The last steps have gone far along it, and made nothing better.
            singular = flat & ~negative
            solution = choose(singular, best, solution)
            squared = torch.where(singular, least, squared)
            alive = known & ~flat
            if alive.is_cpu and not bool(alive):
                break
            step = torch.where(alive, squared / curvature, 0.0)
            solution = axpy(solution, step, direction)
            residual = axpy(residual, -step, product)
            image = state.precondition(residual)
            before = squared
            squared = torch.where(alive, dot(residual, image).double(), before)
            better = alive & (squared < _BETTER * least)
            best, least = choose(better, solution, best), torch.where(better, squared, least)
            reached = alive & (squared <= goal)
            code = torch.where(reached, _CONVERGED, code)
            alive = alive & ~reached
            plain = image is residual
            further = torch.where(alive, squared / before, 0.0)
            direction = axpy(image, further, direction)
            dual = direction if plain else axpy(residual, further, dual)

        def judged(numbers: list[float]) -> InverseResult:
            size, squares, top, number = numbers
            residual_norm = math.sqrt(max(squares, 0.0))
            stats = SolveStats(
                residual_norm=residual_norm,
                relative_residual=relative(residual_norm, size),
                largest_eigenvalue=top or None,
            )
            status = _STATUSES[int(number)] if math.isfinite(size) else SolveStatus.NONFINITE
            return InverseResult(list(solution), status, stats)

        return Unread(list(solution), Later([length, squared, largest, code], judged))


_STATUSES = (
    SolveStatus.CONVERGED,
    SolveStatus.TRUNCATED,
    SolveStatus.NONFINITE,
    SolveStatus.NEGATIVE_CURVATURE,
    SolveStatus.SINGULAR,
)
_CONVERGED, _TRUNCATED, _NONFINITE, _NEGATIVE, _SINGULAR = map(float, range(len(_STATUSES)))
_FIRST_LOOK = 8


def _looks(step: int, flag: Tensor) -> bool:
    """Return whether to look before a step if there is one to take.

    On the CPU a look costs nothing. A device is waited for, so after 8, 16, 32, ... steps only: of
    a long solve at most half the products are made for nothing, and a short one waits for none.
    """
    return flag.is_cpu or (step >= _FIRST_LOOK and step & (step - 1) == 0)
