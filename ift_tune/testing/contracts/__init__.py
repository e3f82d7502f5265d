"""The laws of each family, for the package's own members and for anyone's: call them in a test."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ift_tune.testing.contracts.arm import check_arm
    from ift_tune.testing.contracts.inverse import check_inverse
    from ift_tune.testing.contracts.kind import check_kind
    from ift_tune.testing.contracts.task import check_task

_HOMES = {
    "check_inverse": "inverse",
    "check_kind": "kind",
    "check_task": "task",
    "check_arm": "arm",
}


def __getattr__(name: str) -> Any:
    """Load a check from its file when it is first asked for.

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = ["check_arm", "check_inverse", "check_kind", "check_task"]
