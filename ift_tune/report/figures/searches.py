"""Trials of the arms that search, and what they varied: what the search figures share."""

from __future__ import annotations

import pandas as pd

from ift_tune.compare.findings import Findings
from ift_tune.joint.config import MetaConfig
from ift_tune.report.wording import COARSE_PREFIX


def searching(findings: Findings) -> dict[str, pd.DataFrame]:
    """Return the measured trials of each arm that has run several for a seed, in order."""
    trials = findings.results.trials.dropna(subset=["best_value"]).sort_values(["seed", "trial"])
    found = {}
    for arm in findings.arms:
        own = trials[trials["arm"] == arm.name]
        if own.groupby("seed").size().max() > 1:
            found[arm.name] = own
    return found


def complete(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that ran to their end: those that Optuna weighs parameters by."""
    return trials[trials["status"] == "complete"]


def searched(trials: pd.DataFrame) -> list[str]:
    """Return the columns of the parameters that take more than one value in these trials."""
    keys = MetaConfig.flat_keys()
    return [
        str(column)
        for column in trials
        if (str(column).startswith(COARSE_PREFIX) or column in keys)
        and trials[column].nunique() > 1
    ]
