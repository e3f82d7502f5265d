"""The command that is being carried out, for the run directory that it writes to note."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

COMMAND = "command"
"""Of run.json: what began the run, or went on with it last, to be given again; decides nothing."""

_Noted = dict[str, dict[str, Any]]
_CURRENT: ContextVar[_Noted | None] = ContextVar("ift_tune_command", default=None)


@contextlib.contextmanager
def carrying_out(name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Let the runs that begin in here know which command begins them.

    Args:
        name: Of the command, as ``run``.
        settings: What was given to it, by the names of its flags, as plain values without secrets.
    """
    token = _CURRENT.set({name: dict(settings)})
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_command() -> _Noted | None:
    """Return the settings of the command by its name; None for a call in Python.

    Example:
        >>> from ift_tune.base.command import carrying_out, current_command
        >>> with carrying_out("run", {"task": "digits-cleaning"}):
        ...     current_command()
        {'run': {'task': 'digits-cleaning'}}
        >>> current_command() is None
        True
    """
    return _CURRENT.get()
