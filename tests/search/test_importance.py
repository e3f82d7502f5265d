"""Importances are Optuna's, from a table alone."""

from __future__ import annotations

import numpy as np
import optuna
import pandas as pd
import pytest

from ift_tune.search.analysis import LEAST_TRIALS, parameter_importances


def _trials(count: int = 40) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "rate": 10.0 ** draw.uniform(-4, 0, count),
            "terms": draw.integers(0, 9, count),
            "kind": draw.choice(["a", "b"], count),
            "flag": draw.choice([True, False], count),
            "same": 1.0,
            "partly": np.where(np.arange(count) % 2, 1.0, np.nan),
        }
    )
    table["value"] = np.log10(table["rate"]) ** 2 + 0.1 * (table["kind"] == "a")
    return table


PARAMETERS = ["rate", "terms", "kind", "flag", "same", "partly"]


def test_what_matters_comes_first_and_shares_sum_to_one() -> None:
    found = parameter_importances(_trials(), "value", PARAMETERS)
    assert found is not None
    assert set(found) == {"rate", "terms", "kind", "flag"}
    assert next(iter(found)) == "rate"
    assert found["rate"] > 0.8
    assert sum(found.values()) == pytest.approx(1.0)
    assert found == parameter_importances(_trials(), "value", PARAMETERS)


def test_too_little_gives_none() -> None:
    assert parameter_importances(_trials(LEAST_TRIALS - 1), "value", PARAMETERS) is None
    assert parameter_importances(_trials(), "value", ["same"]) is None
    assert parameter_importances(_trials().assign(value=1.0), "value", PARAMETERS) is None
    failed = _trials().assign(value=np.nan)
    assert parameter_importances(failed, "value", PARAMETERS) is None


def test_optuna_logs_as_before() -> None:
    before = optuna.logging.get_verbosity()
    parameter_importances(_trials(), "value", PARAMETERS)
    assert optuna.logging.get_verbosity() == before
