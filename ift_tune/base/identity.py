"""What a run or a study is: settings as plain values, compared before anything is added to one."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ift_tune.base.errors import UsageError

FACTORY = "factory"  # who makes the problems; earlier versions did not write that down
_BEFORE = {
    "mode": "min",
    "fidelity": "outer_steps",
}  # what held when there was no such setting; None where nothing is said
_SHOWN = 4  # differences that a message spells out

_log = logging.getLogger(__name__)


def require_same(what: str, begun: Mapping[str, Any], now: Mapping[str, Any], *, mend: str) -> None:
    """Compare what a run or a study was begun with with what is asked for now.

    A setting that there was not when it was begun has the value that held then.

    Args:
        what: What was begun.
        begun: Its settings, as they were read.
        now: Those asked for, as plain values.
        mend: What to do instead.

    Raises:
        UsageError: If they differ; every setting is named, with both values.

    Example:
        >>> from ift_tune.base.identity import require_same
        >>> require_same("run", {"seed": 0}, {"seed": 0, "mode": "min"}, mend="resume it as it is")
        >>> require_same("run", {"seed": 0}, {"seed": 1}, mend="resume with seed 0")
        Traceback (most recent call last):
        ift_tune.base.errors.UsageError: run was begun with another seed; resume with seed 0 ...
    """
    differences = {
        key: pairs for key in {**begun, **now} if (pairs := _differences(key, begun, now))
    }
    if not differences:
        return
    names = ", ".join(sorted(differences))
    pairs = [pair for key in sorted(differences) for pair in differences[key]]
    before = ", ".join(f"{name} {was}" for name, was, _ in pairs[:_SHOWN])
    wanted = ", ".join(f"{name} {is_now}" for name, _, is_now in pairs[:_SHOWN])
    raise UsageError(
        f"{what} was begun with another {names}; {mend} (it has {before}, got {wanted})"
    )


def _differences(
    key: str, begun: Mapping[str, Any], now: Mapping[str, Any], within: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return ``(name, before, now)`` of what differs under a key, each part by itself."""
    name = f"{within}{key}"
    if key not in now:
        return [(name, begun[key], _BEFORE.get(name, "none"))]
    if key not in begun and name == FACTORY:
        return []
    was, is_now = begun.get(key, _BEFORE.get(name)), now[key]
    if isinstance(was, Mapping) and isinstance(is_now, Mapping):
        parts = [_differences(k, was, is_now, f"{name}.") for k in {**was, **is_now}]
        return [pair for part in parts for pair in part]
    return [] if was == is_now else [(name, was, is_now)]


def without_factory(
    what: str, begun: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both without their factory; that it is another one is said and not refused.

    Whoever goes on with a run of their own may have corrected the factory that it failed with.
    """
    was, is_now = begun.get(FACTORY), now.get(FACTORY)
    if was is not None and is_now is not None and was != is_now:
        _log.warning("%s was begun with the factory %s and goes on with %s", what, was, is_now)
    one, other = ({k: v for k, v in side.items() if k != FACTORY} for side in (begun, now))
    return one, other


def known_as(begun: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by which a run is known: those that it was begun with, if it was.

    So it keeps its name, and its study, when settings are added to the package. The factory, which
    may be moved or corrected, is none of them.
    """
    known = {key: begun[key] for key in now if key in begun} if begun else dict(now)
    return {key: value for key, value in known.items() if key != FACTORY}


def factory_name(factory: Callable[..., Any]) -> str:
    """Return where a factory comes from, and with which options, as far as that can be told.

    Options are the numbers, words and flags of a `functools.partial` or of a dataclass; not paths,
    which differ between machines.

    Example:
        >>> import functools
        >>> from ift_tune.base.identity import factory_name
        >>> from ift_tune.testing import Quadratic
        >>> factory_name(functools.partial(Quadratic, weights=6, seed=1))
        'ift_tune.testing.problems:Quadratic(weights=6, seed=1)'
    """
    if isinstance(factory, functools.partial):
        values = {str(i): value for i, value in enumerate(factory.args)} | factory.keywords
        return f"{factory_name(factory.func)}({_plain(values)})"
    owner = getattr(factory, "__self__", None)
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    name = f"{module_name(named.__module__)}:{named.__qualname__}"
    if isinstance(owner_name := getattr(owner, "name", None), str):
        return f"{name}({owner_name})"
    holder = owner if owner is not None else factory
    if is_dataclass(holder) and not isinstance(holder, type):
        return f"{name}({_plain({f.name: getattr(holder, f.name) for f in fields(holder)})})"
    return name


def _plain(values: Mapping[str, Any]) -> str:
    found = {k: v for k, v in values.items() if isinstance(v, bool | int | float | str)}
    return ", ".join(f"{k}={v!r}" for k, v in found.items() if os.sep not in str(v))


def module_name(name: str) -> str:
    """Return a module's name; that of a script by its file, as whoever imports it calls it."""
    if name not in ("__main__", "__mp_main__"):  # the latter in a process started by it
        return name
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return name if file is None else Path(file).stem
