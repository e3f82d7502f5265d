"""The exact inverse by factorising the whole matrix: small nets only, the oracle of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ift_tune.base.arguments import known_keywords, take_plain
from ift_tune.base.errors import UsageError, require_integer, require_number
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
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import Tensors, count, flatten, precision, unflatten

_TOLERANCE = 1e-3  # relative residual above which a system is singular to the arithmetic


@dataclass(frozen=True, kw_only=True)
class DenseState(State):
    """The matrix (P, P) as its products make it, its eigenvalues (P,) and eigenvectors (P, P).

    `finite` is whether its entries are; else the eigenvalues are NaN.
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor
    finite: Tensor


@known_keywords()
@dataclass(frozen=True)
class Dense(Inverse[DenseState]):
    """q = (H + damping·I)⁻¹v exactly, by P products and an eigendecomposition, O(P³).

    Where an eigenvalue is zero to rounding its direction is left out (the pseudo-inverse) and the
    status is SINGULAR. With a negative eigenvalue the answer is still that of the linear system.

    Attributes:
        damping: Added to the diagonal, at least 0.
        max_weights: Refuse larger problems than this.

    Raises:
        UsageError: If a value is out of range; from `init`, if the problem is too large.

    Example:
        >>> import torch
        >>> from ift_tune import Dense, hypergradient
        >>> w, decay = (torch.tensor([x], requires_grad=True) for x in (2.0, 4.0))
        >>> train, val = (decay * w.square()).sum(), w.sum()  # H = 2·decay = 8
        >>> hypergradient(train, val, [w], [decay], inverse=Dense()).grads  # −v·H⁻¹·2w
        [tensor([-0.5000])]
    """

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "exact, by P products and an eigendecomposition: small nets only"

    waits: ClassVar[bool] = False
    measured: ClassVar[Literal["always", "claimed", "never"]] = "never"

    damping: float = 0.0
    max_weights: int = 5000

    def __post_init__(self) -> None:
        take_plain(self)
        require_number("damping", self.damping, least=0.0)
        require_integer("max_weights", self.max_weights, 1)

    @classmethod
    def examples(cls) -> list[Self]:
        """Return the exact inverse, and that of a damped system."""
        return [cls(), cls(damping=0.1)]

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return P."""
        return weights

    def max_further_hvps(self, weights: int) -> int:
        """Return 0: the matrix serves all."""
        return 0

    def _init(self, operator: Operator, previous: Eigenpair | None) -> DenseState:
        """Form the matrix and decompose it."""
        size = count(operator.like)
        if size > self.max_weights:
            raise UsageError(
                f"Dense would form a {size:,} × {size:,} matrix; use ConjugateGradient, or raise "
                f"max_weights above {self.max_weights:,} if there is memory and time for it"
            )
        operator = damped(operator, self.damping)
        matrix = operator.dense()
        finite = torch.isfinite(matrix).all()
        # Products in low precision are not symmetric; the residual is that of the matrix as it is.
        values, vectors = torch.linalg.eigh(torch.where(finite, 0.5 * (matrix + matrix.T), 0.0))
        values = torch.where(finite, values, torch.nan)
        return DenseState(
            operator=operator, matrix=matrix, values=values, vectors=vectors, finite=finite
        )

    def _solve(self, state: DenseState, vector: Tensors, length: Tensor) -> Unread:
        """Solve in the eigenbasis."""
        flat = flatten(vector)
        largest = state.values.abs().max()
        least = max(flat.numel() * precision(vector), state.operator.rounding)
        keep = state.values.abs() > least * largest
        # The pseudo-inverse: an eigenvalue below P·ε·|λ|_max cannot be told from 0, and what it
        # would contribute is rounding error divided by rounding error.
        coordinates = torch.where(keep, state.vectors.T @ flat / state.values, 0.0)
        solution = torch.where(state.finite, state.vectors @ coordinates, torch.nan)
        residual = torch.linalg.vector_norm(flat - state.matrix @ solution)
        negative = (keep & (state.values < 0.0)).any()

        def judged(numbers: list[float]) -> InverseResult:
            size, remains, top, finite, whole, indefinite = numbers
            if not finite:
                return InverseResult(answer, SolveStatus.NONFINITE)
            # Where the matrix is nearly singular, the residual of the solution shows it.
            exact = whole and remains <= _TOLERANCE * size
            status = SolveStatus.CONVERGED if exact else SolveStatus.SINGULAR
            stats = SolveStats(
                residual_norm=remains,
                relative_residual=relative(remains, size),
                largest_eigenvalue=top,
            )
            if indefinite:
                status = SolveStatus.NEGATIVE_CURVATURE
            return InverseResult(answer, status, stats)

        answer = unflatten(solution, vector)
        told = [length, residual, state.values[-1], state.finite, keep.all(), negative]
        return Unread(answer, Later(told, judged))
