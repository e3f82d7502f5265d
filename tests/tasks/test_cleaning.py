"""What a cleaning problem shows: the weights by what the labels are, which no loss knows."""

from __future__ import annotations

import pytest
import torch

from ift_tune import tasks
from ift_tune.base.views import Histogram
from ift_tune.hyper import Compose, ExampleWeights
from ift_tune.tasks.problems import CleaningProblem


def test_weights_are_shown_in_two_groups() -> None:
    task = tasks.get("digits-cleaning")
    problem = task.make_problem(task.default_config, "cpu", 0)
    assert isinstance(problem, CleaningProblem)
    assert isinstance(problem.hyper, Compose)
    weights = problem.hyper["examples"]
    assert isinstance(weights, ExampleWeights)
    with torch.no_grad():
        weights.raw.copy_(torch.where(problem.clean, 2.0, -2.0))
    (view,) = problem.views()
    assert isinstance(view, Histogram)
    clean, corrupted = (torch.as_tensor(view.values[k]) for k in ("clean", "corrupted"))
    assert (len(clean), len(corrupted)) == (
        int(problem.clean.sum()),
        int((~problem.clean).sum()),
    )
    torch.testing.assert_close(clean, torch.full_like(clean, 2.0).sigmoid())
    torch.testing.assert_close(corrupted, torch.full_like(corrupted, -2.0).sigmoid())
    (plain,) = weights.views()
    assert isinstance(plain, Histogram)
    assert plain.values["all"].mean() == pytest.approx(float(weights().detach().mean()))
