"""The approximations that the inverse-Hessian study compares, and the exact answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.curvature import Operator, damped, largest_eigenvalue
from ift_tune.implicit.inverse import INVERSES, Dense, Inverse
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import Tensors, count, flatten, norm, sub, unflatten

STEPS = (0, 1, 2, 3, 5, 10, 20, 35, 50)
"""Loop passes, iterations, columns or unrolled steps: the paper goes to 50."""

UNROLLED = "unrolled"


@dataclass(frozen=True)
class Method:
    """A family of approximations by their number of steps.

    Attributes:
        name: In the tables.
        make: From the number of steps to the inverse.
        least: The smallest number of steps it can take.
        most: The largest that differs from the one before.
        gauss_newton: Whether it is given the Gauss-Newton matrix in place of the Hessian.
    """

    name: str
    make: Callable[[int], Inverse]
    least: int = 1
    most: int | None = None
    gauss_newton: bool = False

    def among(self, steps: Sequence[int]) -> list[int]:
        """Return the numbers of steps that it can take."""
        most = max(steps, default=0) if self.most is None else self.most
        return [k for k in steps if self.least <= k <= most]


def with_steps(kind: type[Inverse], steps: int) -> Inverse:
    """Return the inverse that takes just so many steps."""
    settings: dict[str, float] = {**kind.full_length}
    if kind.steps_field is not None:
        settings[kind.steps_field] = steps
    return kind(**settings)


def least_steps(kind: type[Inverse]) -> int:
    """Return the smallest number of steps that the inverse can take: 0, or 1."""
    try:
        with_steps(kind, 0)
    except UsageError:
        return 1
    return 0


def all_methods() -> tuple[Method, ...]:
    """Return the methods on the Hessian, then on the Gauss-Newton matrix.

    An inverse without a number of steps is a single point where it takes no product. `Dense`, the
    reference, is none. The Gauss-Newton matrix is for those that negative curvature leads astray:
    solves that go on from what they have. A low-rank model leaves such directions out by itself.
    """
    stepped = [kind for kind in INVERSES.values() if kind.steps_field is not None]
    found = [
        Method(kind.name, functools.partial(with_steps, kind), least=least_steps(kind))
        if kind in stepped
        else Method(kind.name, functools.partial(with_steps, kind), least=0, most=0)
        for kind in INVERSES.values()
        if kind in stepped or kind().max_hvps(1, previous=False) == 0
    ]
    return (
        *found,
        *(
            replace(method, name=f"{method.name}, gauss_newton", gauss_newton=True)
            for method in found
            if INVERSES[method.name].refines
        ),
    )


METHODS = all_methods()
"""All but unrolling, which is no inverse."""

DENSE_WEIGHTS = 3000
_TOLERANCE = 1e-10  # of MINRES, relative to ‖v‖
_EIGENVALUE_STEPS = 60  # of power iteration, for each end of the spectrum


@dataclass(frozen=True)
class Exact:
    """The reference.

    Attributes:
        how: ``"dense"``, or ``"minres"`` where P is too large for a matrix.
        solution: q = (H + damping·I)⁻¹v.
        grads: The hypergradient that it gives.
        residual: ‖v − (H + damping·I)q‖/‖v‖, computed with a product of its own.
        smallest_eigenvalue: Of H: exact if dense, else an upper bound by power iteration.
        largest_eigenvalue: Exact if dense, else a lower bound.
        products: What it took.
    """

    how: str
    solution: list[Tensor]
    grads: list[Tensor]
    residual: float
    smallest_eigenvalue: float
    largest_eigenvalue: float
    products: int

    @property
    def indefinite(self) -> bool:
        """Whether H has a negative eigenvalue, beyond rounding."""
        return self.smallest_eigenvalue < -1e-10 * abs(self.largest_eigenvalue)


def solve_exactly(
    linearisation: Linearisation,
    *,
    damping: float = 0.0,
    dense_weights: int = DENSE_WEIGHTS,
    most_steps: int = 2000,
) -> Exact:
    """Return the reference at the weights of a linearisation.

    Args:
        linearisation: Of a problem in float64.
        damping: Added to the diagonal of H in the reference alone.
        dense_weights: Above so many weights, MINRES (Paige and Saunders 1975) in place of the
            dense matrix: unlike conjugate gradient it solves indefinite systems too.
        most_steps: Of MINRES.
    """
    hessian, vector = linearisation.operator, linearisation.vector
    operator = damped(hessian, damping)
    if count(vector) <= dense_weights:
        how = "dense"
        inverse = Dense(damping=damping, max_weights=dense_weights)
        state = inverse.init(hessian)
        solution = inverse.solve(state, vector).value
        smallest, largest = math.nan, math.nan  # of a matrix that is not finite
        if state.values is not None:
            smallest, largest = (float(state.values[end]) - damping for end in (0, -1))
    else:
        how = "minres"
        solution = _minres(operator, vector, most_steps)
        smallest, largest = _extremes(hessian)
    products = hessian.products
    # The solver's own residual would be believed to be small where the solver has gone astray.
    remainder = sub(vector, operator.matvec(solution))
    return Exact(
        how,
        solution,
        linearisation.contract(solution),
        float(norm(remainder)) / max(float(norm(vector)), 1e-300),
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
