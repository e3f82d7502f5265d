"""Which trial of a search is the best."""

from __future__ import annotations

from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState

from ift_tune.base.status import FEATURED, TrialStatus
from ift_tune.search.space import Space


def best_point(study: optuna.Study) -> dict[str, Any] | None:
    """Return the best complete trial of a study as plain values, or None."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return None
    best = min(complete, key=lambda t: (t.value, t.number))
    return {"trial": best.number, "value": best.value, "params": best.params, **best.user_attrs}


def best_row(trials: pd.DataFrame, space: Space, metric: str | None) -> dict[str, Any] | None:
    """Return the same from a `trials` table, for searches without a study.

    Args:
        trials: The table.
        space: Its keys are the trial's point.
        metric: The search metric; None as for `Trial`.
    """
    if metric is None:
        metric = "search_error" if trials["search_error"].notna().any() else "search_loss"
    if metric not in trials:
        return None
    complete = trials[trials["status"] == TrialStatus.COMPLETE.value].dropna(subset=[metric])
    if complete.empty:
        return None
    best = complete.sort_values([metric, "trial"]).iloc[0].dropna()
    plain = {str(k): v.item() if hasattr(v, "item") else v for k, v in best.items()}
    return {
        "trial": plain["trial"],
        "value": plain[metric],
        "params": {key: plain[key] for key in space.distributions if key in plain},
        "metric": metric,
        "stop_reason": plain["stop_reason"],
        **{name: plain[name] for name in FEATURED if name in plain},
    }
