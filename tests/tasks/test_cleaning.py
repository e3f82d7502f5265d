"""What a cleaning problem shows: the weights by what the labels are, which no loss knows."""

from __future__ import annotations

import pytest
import torch

from ift_tune import UsageError, tasks
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


@pytest.mark.parametrize(("val", "corrupted"), [(60, 0.2), (200, 0.8), (150, 0.0)])
def test_how_many_are_clean_and_how_many_labels_are_wrong_can_be_set(
    val: int, corrupted: float
) -> None:
    usual = tasks.get("digits-cleaning")
    task = tasks.get("digits-cleaning", options={"val": val, "corrupted": corrupted})
    one, other = (t.make_problem(t.default_config, "cpu", 3) for t in (usual, task))
    assert isinstance(other, CleaningProblem)
    ((inputs, targets),) = other.splits.val
    assert len(inputs) == len(targets) == val
    assert len(other.clean) == usual.sizes.train
    wrong = 1.0 - float(other.clean.float().mean())
    assert wrong == pytest.approx(0.9 * corrupted, abs=0.05)  # a tenth are redrawn as they were
    # The training examples of a seed stay the same ones.
    (mine, *_), (theirs, *_) = next(iter(one.splits.train)), next(iter(other.splits.train))
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


NOISY = sorted(name for name, task in tasks.TASKS.items() if "corrupted" in task.options())


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("fraction", [1.5, -0.1, float("nan")])
def test_a_fraction_of_wrong_labels_beyond_one_is_refused(name: str, fraction: float) -> None:
    said = f"corrupted must be a fraction from 0 to 1, got {fraction}"
    with pytest.raises(UsageError, match=said):
        tasks.get(name, options={"corrupted": fraction})
