"""The approximations that the inverse-Hessian study compares. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ift_tune.implicit.inverse import ConjugateGradient, Identity, Inverse, Neumann, Nystrom

STEPS = (0, 1, 2, 3, 5, 10, 20, 35, 50)
"""Loop passes, iterations, columns or unrolled steps: the paper goes to 50."""

UNROLLED = "unrolled"
_ROUNDING = 1e-14  # a tolerance that stops a solve only where float64 holds nothing more


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


def _neumann(steps: int) -> Inverse:
    return Neumann(terms=steps)


def _conjugate_gradient(steps: int) -> Inverse:
    return ConjugateGradient(max_steps=steps, tolerance=_ROUNDING)


METHODS = (
    Method("identity", lambda _: Identity(), least=0, most=0),
    Method("neumann", _neumann, least=0),
    Method("conjugate_gradient", _conjugate_gradient),
    Method("nystrom", lambda rank: Nystrom(rank=rank)),
    Method("neumann, gauss_newton", _neumann, least=0, gauss_newton=True),
    Method("conjugate_gradient, gauss_newton", _conjugate_gradient, gauss_newton=True),
)
"""All but unrolling, which is no inverse."""
