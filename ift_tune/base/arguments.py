"""Checks of what a caller hands in, beside those of numbers in `errors`."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ift_tune.base.errors import UsageError, nearest, require_integer

Class = TypeVar("Class", bound=type)

_INTEGERS = (
    int,
    int | None,
    "int",
    "int | None",
)  # of a dataclass's fields; those of ours are text

_LONGEST_NAME = 255  # bytes, on every common file system


def known_keywords(
    elsewhere: Callable[[str], str | None] = lambda name: None,
) -> Callable[[Class], Class]:
    """Return a decorator of classes, whose keywords are looked at before they are made.

    Args:
        elsewhere: Says of a keyword that is unknown where it belongs, if it belongs anywhere.

    Example:
        >>> import ift_tune
        >>> ift_tune.Budget(outer_step=3)
        Traceback (most recent call last):
        ift_tune.base.errors.UsageError: there is no 'outer_step' in Budget; did you mean ...?
    """

    def decorate(kind: Class) -> Class:
        make = kind.__init__  # type: ignore[misc]
        known = [name for name in inspect.signature(make).parameters if name != "self"]

        @functools.wraps(make)
        def made(self: object, *args: Any, **keywords: Any) -> None:
            for name in keywords:
                if name not in known:
                    where = elsewhere(name) or nearest(name, known)
                    raise UsageError(f"there is no {name!r} in {kind.__name__}{where}")
            make(self, *args, **keywords)

        kind.__init__ = made  # type: ignore[misc]
        return kind

    return decorate


def shown(value: object) -> str:
    """Return a value as errors show it: on one line, and not at length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001  (a half-made object may raise anything when it is printed)
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:60]}... ({type(value).__name__})"


def require_instance(name: str, value: object, kind: type | tuple[type, ...], form: str) -> None:
    """Raise a `UsageError` unless `value` is an instance.

    Args:
        name: Of the argument.
        value: What was given.
        kind: The class, or several.
        form: What is wanted, with an example: "a budget such as Budget(outer_steps=20)".
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name} must be {form}, got {shown(value)}")


def require_flag(name: str, value: object) -> None:
    """Raise a `UsageError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, got {shown(value)}")


def require_text(name: str, value: object) -> None:
    """Raise a `UsageError` unless `value` is a text that names something."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UsageError(f"{name} must be a name, a text that is not empty, got {shown(value)}")


def require_list(name: str, values: object, of: str) -> list[Any]:
    """Return the entries of a list, tuple or other iterable that is no text and no mapping.

    Raises:
        UsageError: If it is something else.
    """
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise UsageError(f"{name} must be a list of {of}, got {shown(values)}")
    return list(values)


def require_seed(value: object, name: str = "seed") -> int:
    """Return a seed as a Python number.

    Raises:
        UsageError: If it is no integer from 0 to 2⁶³ − 1.
    """
    require_integer(name, value, 0)
    return int(value)  # type: ignore[call-overload, no-any-return]


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home directory for a ``~`` at its beginning.

    That of a user whom nobody knows stays as it is, as in a shell.
    """
    return Path(os.path.expanduser(path))


def require_path(name: str, value: object) -> Path:
    """Return a path that a file system can have; a ``~`` at its beginning is the home directory.

    Raises:
        UsageError: If it is no path, or holds what no name can.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise UsageError(f"{name} must be a path, got {shown(value)}")
    path = expanded(value)
    if "\0" in str(path):
        raise UsageError(f"{name} must be a path without NUL characters, got {shown(str(path))}")
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise UsageError(
                f"{name} must have names of at most {_LONGEST_NAME} bytes each, got {shown(part)}"
            )
    return path


def require_writable(name: str, path: Path) -> None:
    """Raise a `UsageError` unless a directory is there and writable, or could be made."""
    for place in (path, *path.parents):
        if os.path.exists(place):  # no error where one may not look
            if not place.is_dir():
                raise UsageError(f"{name} must be a directory, but {place} is a file")
            if not os.access(place, os.W_OK | os.X_OK):
                raise UsageError(f"{name} must be a directory that you may write to, got {path}")
            return


def plain(value: Any) -> Any:
    """Return a number of NumPy's, or a tensor of one entry without dimensions, as Python's."""
    return value.item() if getattr(value, "shape", None) == () else value


def whole(value: Any) -> Any:
    """Return a whole number as an int: 64.0, which a table's column or a sampler makes of 64.

    Anything else is returned as `plain` returns it.
    """
    value = plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def take_plain(settings: Any) -> None:
    """Turn NumPy's numbers in a frozen dataclass's fields into Python's, which tables can keep.

    Where a field is an integer, whole floats become one.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        convert = whole if item.type in _INTEGERS else plain
        if (number := convert(value)) is not value:
            object.__setattr__(settings, item.name, number)
