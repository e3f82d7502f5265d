"""The findings as small tables for other programs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ift_tune.base.statistics import Interval
from ift_tune.compare.against import Against
from ift_tune.compare.findings import ArmFindings, Findings

_CONCLUSIONS = {1: "reference better", 0: "no evidence", -1: "other better"}


def summary_tables(findings: Findings) -> dict[str, pd.DataFrame]:
    """Return ``final`` (a row an arm), ``chosen`` (a search) and ``against`` (a comparison)."""
    against = [_against(findings.reference, found) for found in findings.against]
    return {
        "final": pd.DataFrame([_final(arm) for arm in findings.arms]),
        "chosen": findings.chosen,
        "against": pd.DataFrame(against) if against else pd.DataFrame(columns=["reference"]),
    }


def _interval(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _final(arm: ArmFindings) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "summary": arm.summary,
        "seeds": arm.seeds,
        **_interval("retrained", arm.retrained),
        **_interval("search", arm.search),
        "mean_rank": arm.rank,
        "trials": arm.trials,
        "cost": arm.cost,
        "seconds": arm.seconds,
        "optimism": arm.optimism,
        "val_test_gap": arm.val_test_gap,
    }


def _against(reference: str, found: Against) -> dict[str, Any]:
    """Return a comparison; differences are reference minus other, as in the sentences."""
    test = found.test
    difference = Interval(-test.difference.mean, -test.difference.high, -test.difference.low)
    return {
        "reference": reference,
        "other": found.other,
        **_interval("difference", difference),
        "p": test.p,
        "p_holm": found.p_holm,
        "effect": test.effect,
        "wins": test.wins,
        "pairs": test.pairs,
        "conclusion": _CONCLUSIONS[found.conclusion],
        "cost_ratio": found.reach.ratio,
        "reached": found.reach.reached,
        "reach_seeds": found.reach.seeds,
    }
