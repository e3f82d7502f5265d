"""The best trial from a table, for searches without a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_problems import SPACE

from ift_tune.search.analysis import best_row
from ift_tune.trial.tables import RunDirectory


def table_of(path: Path, *trials: dict[str, Any]) -> pd.DataFrame:
    run = RunDirectory(path)
    for number, trial in enumerate(trials):
        record = run.trial(number)
        facts = {"trial": number, "status": "complete", "stop_reason": "done", "alpha": 0.5}
        record.describe(facts | {k: v for k, v in trial.items() if not k.startswith("search_")})
        record.append({"step": 1} | {k: v for k, v in trial.items() if k.startswith("search_")})
    return run.write_tables().trials


def test_the_lowest_error_wins_and_the_earliest_among_equals(tmp_path: Path) -> None:
    errors = (0.3, 0.1, 0.2, 0.1)
    table = table_of(tmp_path, *({"search_error": e, "search_loss": 1.0 - e} for e in errors))
    best = best_row(table.iloc[::-1], SPACE, None)
    assert best is not None
    assert (best["trial"], best["value"], best["metric"]) == (1, 0.1, "search_error")
    assert best["search_loss"] == 0.9


def test_the_loss_counts_where_no_error_was_measured(tmp_path: Path) -> None:
    best = best_row(
        table_of(tmp_path, {"search_loss": 0.5}, {"search_loss": 0.25}), SPACE, metric=None
    )
    assert best is not None
    assert (best["trial"], best["value"], best["metric"]) == (1, 0.25, "search_loss")


def test_the_metric_can_be_chosen(tmp_path: Path) -> None:
    trials = ({"search_error": 0.1, "search_f1": 0.9}, {"search_error": 0.2, "search_f1": 0.8})
    best = best_row(table_of(tmp_path, *trials), SPACE, "search_f1")
    assert best is not None
    assert (best["trial"], best["value"], best["metric"]) == (1, 0.8, "search_f1")


@pytest.mark.parametrize("status", ["pruned", "failed", "interrupted", "running"])
def test_only_complete_trials_with_a_value_count(status: str, tmp_path: Path) -> None:
    trials: list[dict[str, Any]] = [
        {"search_error": 0.1, "status": status},
        {"search_error": 0.2},
        {},
    ]
    best = best_row(table_of(tmp_path, *trials), SPACE, None)
    assert best is not None
    assert best["trial"] == 1


@pytest.mark.parametrize("metric", [None, "search_error", "search_f1"])
def test_without_a_complete_trial_there_is_none(metric: str | None, tmp_path: Path) -> None:
    assert best_row(table_of(tmp_path / "one", {"status": "failed"}), SPACE, metric) is None
    assert best_row(table_of(tmp_path / "none"), SPACE, metric) is None


def test_its_values_are_plain_and_its_point_is_that_of_the_space(tmp_path: Path) -> None:
    trial = {"search_error": 0.1, "alpha": 0.25, "inner_steps": 3, "inner_lr": 0.5, "terms": None}
    best = best_row(table_of(tmp_path, trial), SPACE, None)
    assert best is not None
    assert best["params"] == {"alpha": 0.25, "inner_steps": 3}
    assert json.loads(json.dumps(best, allow_nan=False)) == best
    assert "retrained_test_error" not in best
