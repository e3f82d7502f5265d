"""Which trials of a search are the best, and which searched parameters mattered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.direction import Direction, default_metric
from ift_tune.base.objectives import FEASIBLE, Objectives
from ift_tune.base.status import FAULT, TrialStatus
from ift_tune.search.outcomes import (
    directions_of,
    featured,
    is_feasible,
    objectives_of,
    quiet_study,
)

if TYPE_CHECKING:  # a report asks for importances without PyTorch
    from ift_tune.search.space import Space

LEAST_TRIALS = 10
"""With fewer, random forests see only noise."""

_SEED = 0  # a report that is made twice is the same
_TREES = 64  # as Optuna has it
_LOG_RATIO = 30.0  # from which a positive range is taken to have been searched by its logarithm


def best_point(study: optuna.Study) -> dict[str, Any] | None:
    """Return the best complete trial of a study, in its direction, as plain values, or None.

    Only trials that keep all constraints count. Of several metrics the first decides, and the
    others where it is equal: so it is one of the front.
    """
    ranked = _ranked(study)
    if not ranked:
        return None
    best = ranked[0]
    found = {"trial": best.number, "value": best.values[0], "params": best.params}
    objectives = objectives_of(study)
    if objectives.several:
        found["values"] = dict(zip(objectives.metrics, best.values, strict=True))
    return {**found, **best.user_attrs}


def front_of(study: optuna.Study) -> pd.DataFrame:
    """Return the Pareto front of a study, a row a trial, the best by the first metric first.

    No other complete trial that keeps all constraints is as good as one of these by every metric
    and better by one. Of a single metric it is the best trial, with its equals.

    Returns:
        Columns ``trial``, the metrics, and the parameters that were searched.
    """
    names = [name or "value" for name in objectives_of(study).metrics]
    on_it = {trial.number for trial in study.best_trials}
    front = [trial for trial in _ranked(study) if trial.number in on_it]
    rows = [
        {"trial": t.number, **dict(zip(names, t.values, strict=True)), **t.params} for t in front
    ]
    return pd.DataFrame(rows, columns=None if rows else ["trial", *names])


def _ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials that keep all constraints, the best by the first metric first."""
    signs = [direction.sign for direction in directions_of(study)]

    def losses(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(filter(is_feasible, complete), key=lambda trial: (losses(trial), trial.number))


def best_row(
    trials: pd.DataFrame,
    space: Space,
    metric: str | None,
    direction: Direction = Direction.MIN,
) -> dict[str, Any] | None:
    """Return the same from a `trials` table, for searches without a study.

    Args:
        trials: The table.
        space: Its keys are the trial's point.
        metric: The search metric; None as for `Trial`.
        direction: In which it is better.
    """
    if metric is None:
        metric = default_metric(trials.dropna(axis="columns", how="all"))
    if metric not in trials:
        return None
    able = FEASIBLE if FEASIBLE in trials else "status"
    complete = trials[trials[able].isin([True, TrialStatus.COMPLETE.value])].dropna(subset=[metric])
    if complete.empty:
        return None
    best = direction.best_row(complete, metric).dropna()
    plain = {str(k): v.item() if hasattr(v, "item") else v for k, v in best.items()}
    return {
        "trial": plain["trial"],
        "value": plain[metric],
        "params": {key: plain[key] for key in space.distributions if key in plain},
        "metric": metric,
        "mode": direction.value,
        "stop_reason": plain["stop_reason"],
        **{name: plain[name] for name in featured(metric) if name in plain},
    }


def without_result(trials: pd.DataFrame) -> str:
    """Say of a search that has no best trial how its trials ended.

    Args:
        trials: The table.
    """
    if (FEASIBLE in trials) and (trials["status"] == TrialStatus.COMPLETE.value).any():
        constraints = Objectives.of_run(trials.attrs.get("run")).constraints
        return (
            f"no trial keeps {' and '.join(map(str, constraints))}: loosen the bounds, or search "
            "where they hold; the tables have what each trial measured"
        )
    reasons = trials["stop_reason"].dropna() if "stop_reason" in trials else ()
    faults = list(trials[FAULT].dropna()) if FAULT in trials else []
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
    return (
        f"no trial came to its end with a finite value ({counts or 'none was finished'}): lower "
        "inner_lr, meta_lr or their ranges, or prune less; see stop_reason and solve_status in the "
        "tables" + (f". Of the last one, {faults[-1]}" if faults else "")
    )


def parameter_importances(
    trials: pd.DataFrame, value: str, parameters: Sequence[str]
) -> dict[str, float] | None:
    """Return how much of the variation of the value each parameter explains, by fANOVA.

    The trials are put into a normal study in memory, so the answer is Optuna's own. A parameter
    that some of the trials do not have, or that takes one value only, is left out.

    Args:
        trials: One row a complete trial.
        value: The column that was optimised.
        parameters: The columns that were searched.

    Returns:
        Shares by column, the largest first; they sum to 1. None if there are fewer than
        `LEAST_TRIALS` trials, or nothing varies.
    """
    rows = trials.dropna(subset=[value])
    parameters = [p for p in parameters if rows[p].notna().all() and rows[p].nunique() > 1]
    if len(rows) < LEAST_TRIALS or not parameters or rows[value].nunique() < 2:
        return None
    columns = {name: _plain(rows[name]) for name in parameters}
    distributions = {name: _distribution(values) for name, values in columns.items()}
    study = quiet_study(Objectives.of(None, None), optuna.samplers.RandomSampler(seed=_SEED))
    study.add_trials(
        optuna.trial.create_trial(
            params={name: values[row] for name, values in columns.items()},
            distributions=distributions,
            value=found,
        )
        for row, found in enumerate(rows[value].astype(float))
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=_SEED)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _plain(column: pd.Series[Any]) -> list[Any]:
    """Return Python values: numbers, or words for everything else."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return [str(value) for value in column]
    numbers = [float(value) for value in column]
    return [int(n) for n in numbers] if all(n.is_integer() for n in numbers) else numbers


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """Return the narrowest distribution that the values can come from."""
    low, high = min(values), max(values)
    if isinstance(low, str):
        return CategoricalDistribution(sorted(set(values)))
    log = low > 0 and high / low >= _LOG_RATIO
    kind = IntDistribution if isinstance(low, int) else FloatDistribution
    return kind(low, high, log=log)
