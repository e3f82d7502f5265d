"""What is said once in a run, however many problems are made for it and trained in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_SAID: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextlib.contextmanager
def saying_once() -> Iterator[None]:
    """Remember what is said inside; a run within a run has the memory of the outer one."""
    token = _SAID.set(set() if (said := _SAID.get()) is None else said)
    try:
        yield
    finally:
        _SAID.reset(token)


def is_new(sentence: str) -> bool:
    """Return whether a sentence has not been asked for in this run; outside of one it is new.

    Example:
        >>> from ift_tune.base.once import is_new, saying_once
        >>> with saying_once():
        ...     print(is_new("beware"), is_new("beware"))
        True False
    """
    said = _SAID.get()
    if said is None:
        return True
    new = sentence not in said
    said.add(sentence)
    return new
