"""The arm of quasi-random search: evenly spread points, which a resumed search repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import qmc
from tiny_comparisons import (
    BATCH,
    CONFIG,
    SIZES,
    Killed,
    Killer,
    assert_same_tables,
    comparison,
    make_clouds,
    run,
)

from ift_tune.compare.arms import ARMS
from ift_tune.search.space import Float
from ift_tune.trial.tables import Results

TRIALS = 1 + 64  # the task's defaults come first
STEP = 1.0 + SIZES["search"] / 3.0 / BATCH
WHOLE = comparison(STEP * TRIALS * (1.0 + 1e-9), batches="drop", training_steps=1)


def discrepancy(results: Results, arm: str) -> float:
    """Return how uneven the points of a search are, the first left out; 0 is even."""
    hyper = make_clouds(CONFIG, torch.device("cpu"), 0).hyper
    space = ARMS[arm].search(WHOLE, hyper).space
    assert space is not None
    columns = []
    for name, d in space.distributions.items():
        assert isinstance(d, Float)
        column = name if name == "inner_lr" else f"knob.{name}"
        values = results.trials[column].astype(float).to_numpy()[1:TRIALS]
        columns.append(np.log(values / d.low) / np.log(d.high / d.low))
    points = np.stack(columns, axis=1)
    assert points.shape == (TRIALS - 1, 4)
    return float(qmc.discrepancy(points, method="CD"))


def test_its_points_are_even_and_repeated_by_a_search_that_is_killed(tmp_path: Path) -> None:
    random = discrepancy(run(WHOLE, tmp_path / "random", "random"), "random")
    whole = run(WHOLE, tmp_path / "whole", "qmc")
    # Sobol' points by SciPy have 0.0013 to 0.0016 here, random ones 0.012 to 0.028.
    assert discrepancy(whole, "qmc") < random / 5.0
    for event, number in (("step", 20), ("started", 20)):
        with pytest.raises(Killed):
            run(WHOLE, tmp_path / "run", "qmc", resume=True, callbacks=[Killer(event, number)])
    assert_same_tables(run(WHOLE, tmp_path / "run", "qmc", resume=True), whole)
