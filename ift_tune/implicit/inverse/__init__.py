"""Inverse-Hessian approximations, one a file. A new one is a file here and a line in `INVERSES`."""

from ift_tune.implicit.inverse.base import Inverse, InverseResult, SolveStats, State
from ift_tune.implicit.inverse.conjugate_gradient import ConjugateGradient
from ift_tune.implicit.inverse.dense import Dense
from ift_tune.implicit.inverse.identity import Identity
from ift_tune.implicit.inverse.neumann import Neumann
from ift_tune.implicit.inverse.nystrom import Nystrom

INVERSES: dict[str, type[Inverse]] = {
    kind.name: kind for kind in (Identity, Neumann, ConjugateGradient, Nystrom, Dense)
}
"""Every inverse by the name it has in search spaces, tables and on the command line."""

__all__ = [
    "INVERSES",
    "ConjugateGradient",
    "Dense",
    "Identity",
    "Inverse",
    "InverseResult",
    "Neumann",
    "Nystrom",
    "SolveStats",
    "State",
]
