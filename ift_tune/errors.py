"""The error tree: every mistake a user can make raises one of these, with the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IFTTuneError(Exception):
    """Base of every error this package raises on purpose."""


class UsageError(IFTTuneError, ValueError):
    """The call cannot mean anything: a wrong value, name, shape or combination."""


class UnreachableHyperparameterError(UsageError):
    """Some hyperparameters do not influence the gradient of the training loss."""


class RunExistsError(UsageError, FileExistsError):
    """The run directory holds a run already."""


class DataNotFoundError(UsageError, FileNotFoundError):
    """A task's data set is not where it was looked for."""


class MissingDependencyError(IFTTuneError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


class DoubleBackwardError(IFTTuneError, RuntimeError):
    """An operation in the training loss has no second derivative."""


class NonFiniteError(IFTTuneError, ArithmeticError):
    """A loss is infinite or NaN: the weights are lost, and going on would only waste time."""


class CheckpointError(IFTTuneError, RuntimeError):
    """A checkpoint is damaged, of another version, or of another problem."""


class WorkerError(IFTTuneError, RuntimeError):
    """A process that ran trials failed or died; the message holds its traceback or exit status."""


class CheckFailedError(IFTTuneError, AssertionError):
    """`testing.check_hypergradient` found a hypergradient that is not the true one."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
