"""The arms. A new one is a file here with its `ARMS`, and that file's name in `_FILES`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError, nearest
from ift_tune.compare.arms.base import Arm, ArmSpace, Grid, Search, Style, TrialKind

_FILES = (
    "standard",
    "staged",
    "qmc",
    "mixtures",
)
ARMS: dict[str, Arm] = {
    arm.name: arm for file in _FILES for arm in import_module(f"{__name__}.{file}").ARMS
}
"""Every arm by name, in the order in which they are listed."""

DEFAULT_ARMS = (
    *("ift+val", "ift", "random", "random+val", "val", "tpe", "none"),
    *("loss-ranking", "proportional", "uniform"),
)
"""Of these, those that a task is one for."""


def get_arms(names: Sequence[str]) -> list[Arm]:
    """Return arms by name.

    Raises:
        UsageError: If a name is unknown or given twice, or there is none.
    """
    for name in require_list("arms", names, "names such as 'ift' and 'random'"):
        if name not in ARMS:
            raise UsageError(f"there is no arm {name!r}{nearest(name, ARMS)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"name some arms, each once: {', '.join(ARMS)}")
    return [ARMS[name] for name in names]


__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "Arm",
    "ArmSpace",
    "Grid",
    "Search",
    "Style",
    "TrialKind",
    "get_arms",
]
