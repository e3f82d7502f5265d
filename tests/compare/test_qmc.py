"""The arm of quasi-random search: evenly spread points, which a resumed search repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import qmc
from tiny_comparisons import BATCH, CONFIG, SIZES, Killed, Killer, comparison, make_clouds, run

from ift_tune.compare.arms import ARMS
from ift_tune.compare.comparison import Comparison
from ift_tune.search.space import Float
from ift_tune.trial.tables import Results

TRIALS = 1 + 64  # the task's defaults come first
STEP = 1.0 + SIZES["search"] / 3.0 / BATCH


def of_length(trials: int) -> Comparison:
    """Return a comparison that pays for so many trials of one step each."""
    return comparison(STEP * trials * (1.0 + 1e-9), batches="drop", training_steps=1)


def points(results: Results) -> NDArray[np.float64]:
    """Return the points of a search in the unit cube, in order; shape (trials, 4)."""
    hyper = make_clouds(CONFIG, torch.device("cpu"), 0).hyper
    space = ARMS["qmc"].search(of_length(1), hyper).space
    assert space is not None
    columns = []
    for name, d in space.distributions.items():
        assert isinstance(d, Float)
        values = results.trials[name if name == "inner_lr" else f"knob.{name}"].astype(float)
        columns.append(np.log(values.to_numpy() / d.low) / np.log(d.high / d.low))
    return np.stack(columns, axis=1)


def test_points_are_even_and_those_of_an_undisturbed_search_wherever_it_is_killed(
    tmp_path: Path,
) -> None:
    whole, out = of_length(TRIALS), tmp_path / "run"
    for event, number in (("step", 6), ("started", 6)):
        with pytest.raises(Killed):
            run(whole, out, "qmc", resume=True, callbacks=[Killer(event, number)])
    found = points(run(whole, out, "qmc", resume=True))[:TRIALS]
    undisturbed = points(run(of_length(15), tmp_path / "undisturbed", "qmc"))
    assert np.array_equal(found[:15], undisturbed[:15])

    # By SciPy: its Sobol' points have 0.0013 to 0.0016, random ones 0.012 to 0.028.
    even = qmc.discrepancy(found[1:], method="CD")
    random = qmc.discrepancy(np.random.default_rng(0).random(found[1:].shape), method="CD")
    assert even < 0.002
    assert even < random / 5.0
