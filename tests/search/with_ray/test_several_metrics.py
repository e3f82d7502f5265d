"""Ray runs a study of several metrics, with constraints: the same values, front and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import UsageError, run_study
from ift_tune.search.ray import run_ray

METRICS = ["search_loss", "gradient_equivalents"]
SETTINGS: dict[str, Any] = {"config": CONFIG, "device": "cpu", "metric": METRICS}
SETTINGS |= {"sampler": "random", "n_trials": 3, "constraints": ["alpha_lambda_max<=1"]}


@pytest.mark.nightly
def test_rays_front_is_that_of_a_study_here(tmp_path: Path) -> None:
    here = run_study(make_tiny, SPACE, BUDGET, out=tmp_path / "here", **SETTINGS)
    there = run_ray(make_tiny, SPACE, BUDGET, out=tmp_path / "there", **SETTINGS)
    assert there.study is not None
    for one, other in zip(here.study.trials, there.study.trials, strict=True):
        assert other.state is TrialState.COMPLETE
        assert other.values == pytest.approx(one.values)
        assert other.constraints == pytest.approx(one.constraints)
    assert list(there.front["trial"]) == list(here.front["trial"])  # type: ignore[index]
    for column in ("pareto", "feasible"):
        assert list(there.trials[column]) == list(here.trials[column])
    assert there.best is not None
    assert here.best is not None
    assert there.best["values"] == pytest.approx(here.best["values"])


def test_a_population_follows_one_metric(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pbt copies what is better by one metric"):
        run_ray(make_tiny, SPACE, BUDGET, out=tmp_path / "run", scheduler="pbt", **SETTINGS)
    assert not (tmp_path / "run").exists()
