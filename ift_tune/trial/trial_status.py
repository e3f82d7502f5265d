"""What the tables say about a trial as a whole, in the same words under every backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ift_tune.base.status import FOUND_PREFIXES, SolveStatus, StopReason, TrialStatus
from ift_tune.joint.config import MetaConfig

RUNNING = {"status": TrialStatus.RUNNING.value, "stop_reason": None}


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
    return {"status": TrialStatus.after(reason).value, "stop_reason": reason.value}


def found_at_the_end(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured once, at the trial's end."""
    return {k: v for k, v in metrics.items() if k.startswith(FOUND_PREFIXES)}
