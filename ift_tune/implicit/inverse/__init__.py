"""Inverse-Hessian approximations, one a file. A new one is a file here and a line in `_FILES`."""

from importlib import import_module

from ift_tune.implicit.inverse.base import Inverse, InverseResult, SolveStats, State
from ift_tune.implicit.inverse.conjugate_gradient import ConjugateGradient
from ift_tune.implicit.inverse.dense import Dense
from ift_tune.implicit.inverse.identity import Identity
from ift_tune.implicit.inverse.neumann import Neumann
from ift_tune.implicit.inverse.nystrom import Nystrom

_FILES = (
    "identity",
    "neumann",
    "conjugate_gradient",
    "nystrom",
    "dense",
)


def _defined_in(file: str) -> type[Inverse]:
    """Return the inverse that a file of this folder defines."""
    module = import_module(f"{__name__}.{file}")
    return next(
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Inverse)
        and kind.__module__ == module.__name__
    )


# The order is that of the settings' columns in the tables.
INVERSES: dict[str, type[Inverse]] = {kind.name: kind for kind in map(_defined_in, _FILES)}
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
