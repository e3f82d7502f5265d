"""Which searched parameters mattered: Optuna's fANOVA, from a table alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

LEAST_TRIALS = 10
"""With fewer, random forests see only noise."""


_SEED = 0  # a report that is made twice is the same


_TREES = 64  # as Optuna has it


_LOG_RATIO = 30.0  # from which a positive range is taken to have been searched by its logarithm


def parameter_importances(
    trials: pd.DataFrame, value: str, parameters: Sequence[str]
) -> dict[str, float] | None:
    """Return how much of the variation of the value each parameter explains, by fANOVA.

    The trials are put into a normal study in memory, so the answer is Optuna's own. A parameter
    that some of the trials do not have, or that takes one value only, is left out.

    Args:
        trials: One row a complete trial.
        value: The column that was minimised.
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
    study = _quiet_study()
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


def _quiet_study() -> optuna.Study:
    """Return an empty study in memory, of which Optuna does not tell on the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=_SEED))
    finally:
        optuna.logging.set_verbosity(before)


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
