"""The outer steps of IFT arms: what the health figures and sentences share."""

from __future__ import annotations

import pandas as pd

from ift_tune.compare.findings import Findings

_BINS = 40  # along the outer steps


def outer_steps(findings: Findings) -> dict[str, pd.DataFrame]:
    """Return the rows of `steps` with a hypergradient, by arm; none without IFT arms."""
    steps = findings.results.steps
    if "solve_status" not in steps:
        return {}
    solved = steps[steps["solve_status"].notna()]
    names = [arm.name for arm in findings.arms]
    return {name: own for name in names if len(own := solved[solved["arm"] == name])}


def binned(step: pd.Series[int]) -> pd.Series[float]:
    """Return for each row the middle of its bin of outer steps; few steps are bins of their own."""
    last = int(step.max())
    width = -(-last // _BINS)
    return ((step.astype(int) - 1) // width * width + (width + 1) / 2).astype(float)
