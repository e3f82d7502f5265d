"""What the tables say about a trial as a whole, in the same words under every backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ift_tune.base.status import FOUND_PREFIXES as FOUND_PREFIXES
from ift_tune.base.status import SolveStatus, StopReason
from ift_tune.joint.config import MetaConfig

_STATUS = {
    StopReason.DONE: "complete",
    StopReason.FAILED: "failed",
    StopReason.INTERRUPTED: "interrupted",
}


RUNNING = {"status": "running", "stop_reason": None}


def constants(config: MetaConfig, seed: int, device: str | None) -> dict[str, Any]:
    """Return what is the same in all rows of a trial: every setting, unused ones empty."""
    return {
        **dict.fromkeys(MetaConfig.flat_keys()),
        **config.to_flat(),
        "seed": seed,
        "device": device,
        "retrained_test_error": None,
    }


def stopped_early(result: Mapping[str, Any]) -> StopReason:
    """Return why a search stopped a trial that had not ended by itself, from its last result."""
    bad = (SolveStatus.DIVERGED.value, SolveStatus.NONFINITE.value)
    return StopReason.DIVERGED if result.get("solve_status") in bad else StopReason.PRUNED


def ending(reason: StopReason) -> dict[str, str]:
    """Return the `status` and `stop_reason` of a trial that ended for this reason."""
    return {"status": _STATUS.get(reason, "pruned"), "stop_reason": reason.value}
