"""The arms, one a file. A new one is a file here and a line in `ARMS`."""

from __future__ import annotations

from collections.abc import Sequence

from ift_tune.base.errors import UsageError, nearest
from ift_tune.compare.arms import asha, cmaes, gp, grid, ift, ift_tpe, none, random, random_val, tpe
from ift_tune.compare.arms.base import Arm, BaselineArm, JointArm, Search

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        ift.ARM,
        ift_tpe.ARM,
        random.ARM,
        random_val.ARM,
        tpe.ARM,
        gp.ARM,
        cmaes.ARM,
        grid.ARM,
        asha.ARM,
        none.ARM,
    )
}
"""Every arm by name."""


def get_arms(names: Sequence[str]) -> list[Arm]:
    """Return arms by name.

    Raises:
        UsageError: If a name is unknown or given twice, or there is none.
    """
    for name in names:
        if name not in ARMS:
            raise UsageError(f"there is no arm {name!r}{nearest(name, ARMS)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"name some arms, each once: {', '.join(ARMS)}")
    return [ARMS[name] for name in names]


__all__ = ["ARMS", "Arm", "JointArm", "BaselineArm", "Search", "get_arms"]
