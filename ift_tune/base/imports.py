"""Optional libraries and renamed names: asked for in one sentence, found in one place."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ift_tune.base.errors import MissingDependencyError


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """Import a module of an optional library.

    Args:
        module: Its dotted name, of the library or of one of ours that needs it.
        extra: The extra of this package that brings it.
        what: What needs it, for the error: the subject of "... needs matplotlib".

    Raises:
        MissingDependencyError: If a library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = (error.name or module).partition(".")[0]
        raise MissingDependencyError(
            f"{what} needs {library}: pip install 'ift_tune[{extra}]'"
        ) from error


def renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn, at the caller's caller by default, that a public name has been replaced."""
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed_method(
    old: str,
    new: str | Callable[..., Any],
    keywords: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Return a method that warns and calls the one that has replaced it.

    A class keeps an old name by ``knobs = renamed_method("knobs", "coarse_space")``.

    Args:
        old: The old name.
        new: The new one, looked up on the instance; or the function itself, where subclasses may
            override the old name and call ``super().knobs()``.
        keywords: The present name of each keyword that had another.
    """
    name = new if isinstance(new, str) else new.__name__
    now = keywords or {}

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        renamed(f"{type(self).__name__}.{old}", name)
        given = {now.get(k, k): value for k, value in kwargs.items()}
        if isinstance(new, str):
            return getattr(self, new)(*args, **given)
        return new(self, *args, **given)

    method.__name__ = method.__qualname__ = old
    method.__doc__ = f"Deprecated: use `{name}`."
    return method


def lazy_names(
    module: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``, which load names when they are asked for.

    Args:
        module: The package, its ``__name__``.
        homes: The module of each name.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return load, names
