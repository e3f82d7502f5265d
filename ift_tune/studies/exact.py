"""The exact answer that approximations are measured against, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ift_tune.curvature import Operator, damped, largest_eigenvalue
from ift_tune.hypergradient import Hypergradient
from ift_tune.inverse import Dense, Inverse, InverseResult, State
from ift_tune.studies.still import LinearSystem, StillProblem
from ift_tune.types import Status, Tensors
from ift_tune.vectors import count, flatten, norm, sub, unflatten

DENSE_WEIGHTS = 3000
_TOLERANCE = 1e-10
_EIGENVALUE_STEPS = 60


@dataclass(frozen=True)
class Known(Inverse):
    """An "approximation" whose answer is given: it lets a q found elsewhere become a hypergradient.

    Attributes:
        answer: q.
    """

    name: ClassVar[str] = "known"
    refines: ClassVar[bool] = False

    answer: Tensors = field(default=())

    def most_products(self, weights: int, previous: bool) -> int:
        """Return 0."""
        return 0

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult(list(self.answer), Status.CONVERGED)


@dataclass(frozen=True)
class Exact:
    """The reference.

    Attributes:
        how: ``"dense"``, or ``"minres"`` where P is too large for a matrix.
        solution: q = (H + damping·I)⁻¹v.
        hypergradient: What it gives.
        residual: ‖v − (H + damping·I)q‖/‖v‖, computed with a product of its own.
        smallest_eigenvalue: Of H: exact if dense, else an upper bound by power iteration.
        largest_eigenvalue: Exact if dense, else a lower bound.
        products: What it took.
    """

    how: str
    solution: list[Tensor]
    hypergradient: Hypergradient
    residual: float
    smallest_eigenvalue: float
    largest_eigenvalue: float
    products: int

    @property
    def indefinite(self) -> bool:
        """Whether H has a negative eigenvalue, beyond rounding."""
        return self.smallest_eigenvalue < -1e-10 * abs(self.largest_eigenvalue)


def solve_exactly(
    still: StillProblem,
    system: LinearSystem,
    *,
    damping: float = 0.0,
    dense_weights: int = DENSE_WEIGHTS,
    most_steps: int = 2000,
) -> Exact:
    """Return the reference at the problem's present weights.

    Args:
        still: The problem.
        system: Its linear system there.
        damping: Added to the diagonal of H in the reference alone.
        dense_weights: Above so many weights, MINRES (Paige and Saunders 1975) in place of the
            dense matrix: unlike conjugate gradient it solves indefinite systems too.
        most_steps: Of MINRES.
    """
    operator = damped(system.operator, damping)
    if count(system.vector) <= dense_weights:
        how = "dense"
        state = Dense(max_weights=dense_weights).init(operator)
        solution = Dense(max_weights=dense_weights).solve(state, system.vector).value
        values: Any = getattr(state, "values", None)
        values = torch.full((1,), torch.nan) if values is None else values - damping
        smallest, largest = float(values[0]), float(values[-1])
    else:
        how = "minres"
        solution = _minres(operator, system.vector, most_steps)
        smallest, largest = _extremes(system.operator)
    products = system.operator.products
    remainder = sub(system.vector, operator.matvec(solution))
    return Exact(
        how,
        solution,
        still.hypergradient(Known(tuple(solution))),
        float(norm(remainder)) / max(float(norm(system.vector)), 1e-300),
        smallest,
        largest,
        products,
    )


def _minres(operator: Operator, vector: Tensors, most_steps: int) -> list[Tensor]:
    from scipy.sparse.linalg import LinearOperator, minres

    like = list(vector)
    flat = flatten(like)

    def product(x: np.ndarray[Any, Any]) -> Any:
        given = torch.from_numpy(np.array(x).reshape(-1)).to(flat)
        return flatten(operator.matvec(unflatten(given, like))).cpu().numpy()

    matrix = LinearOperator((flat.numel(), flat.numel()), matvec=product, dtype=np.float64)
    found, _ = minres(matrix, flat.cpu().numpy(), rtol=_TOLERANCE, maxiter=most_steps)
    return unflatten(torch.from_numpy(found).to(flat), like)


def _extremes(operator: Operator) -> tuple[float, float]:
    """Return an upper bound of the smallest eigenvalue and a lower bound of the largest."""
    first = largest_eigenvalue(operator, steps=_EIGENVALUE_STEPS).value
    # H − first·I has its eigenvalue of largest magnitude at the other end of the spectrum.
    other = largest_eigenvalue(damped(operator, -first), steps=_EIGENVALUE_STEPS).value + first
    return min(first, other), max(first, other)
