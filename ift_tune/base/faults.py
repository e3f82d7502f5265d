"""Faults of the environment, told from those of the code: no trial fails by a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.base.urls import blotted

_FAULTS = tuple(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "ENODEV", "ENXIO"),
        *("EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)  # Windows lacks some
)
"""Of no room, no right to write, a device or a server that is gone, too many open files."""

_WRAPPED = re.compile(  # as libraries repeat it: "[Errno 28] No space ...", "No space ... (28)"
    "|".join(rf"errno\W{{0,4}}{n}\b|{re.escape(f'{os.strerror(n)} ({n})')}" for n in _FAULTS),
    re.IGNORECASE,
)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Say of whatever the system refuses inside that it is no fault of the program.

    For files of a run: whoever is here has been let in before.

    Args:
        path: What is written.

    Raises:
        EnvironmentFaultError: In place of an `OSError`.
    """
    try:
        yield
    except EnvironmentFaultError:
        raise
    except OSError as error:
        raise as_fault(f"{path} cannot be written", error) from error


@contextlib.contextmanager
def surroundings(what: str) -> Iterator[None]:
    """Tell faults of the environment from those of the code that runs inside, the user's too.

    Args:
        what: It.

    Raises:
        EnvironmentFaultError: If what was raised, or led to it, is one.
    """
    try:
        yield
    except EnvironmentFaultError:
        raise
    except Exception as error:
        if (fault := fault_of(what, error)) is None:
            raise
        raise fault from error


def fault_of(what: str, error: BaseException) -> EnvironmentFaultError | None:
    """Return what to raise where an exception is, or was raised for, a fault of the environment.

    Args:
        what: What it has stopped.
        error: The exception.

    Returns:
        None if it is the code's.
    """
    if isinstance(error, EnvironmentFaultError):
        return error
    fault = _fault_behind(error)
    return None if fault is None else as_fault(f"{what} was stopped", fault)


def as_fault(what: str, error: BaseException) -> EnvironmentFaultError:
    """Return what to raise: what was stopped, why, and how to go on."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    return EnvironmentFaultError(
        f"{what} ({blotted(reason)}): everything up to here is kept; make room, give back what is "
        "missing or wait for it, and go on with --resume (resume=True)"
    )


def _fault_behind(error: BaseException | None) -> BaseException | None:
    """Return the fault that an exception is or was raised for; libraries wrap them in their own."""
    seen = set()  # a chain of causes may be a circle
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FAULTS:
            return error
        if _WRAPPED.search(str(error)):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
