"""The approximations that the studies compare, made of `INVERSES`: a new one needs no line here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ift_tune.base.errors import UsageError
from ift_tune.implicit.inverse import INVERSES, Inverse

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
