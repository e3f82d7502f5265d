"""Every built-in task is what it says it is."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ift_tune import Batches, BilevelProblem, JointOptimizer, UsageError, tasks
from ift_tune.base.errors import DataNotFoundError
from ift_tune.problem.batches import Loader
from ift_tune.tasks import TASKS, Task
from ift_tune.tasks import datasets as data
from ift_tune.tasks.building import corrupt
from ift_tune.tasks.cleaning import CORRUPTED, CleaningProblem
from ift_tune.tasks.datasets import Images
from ift_tune.trial.tables import METRIC_COLUMNS

SPLITS = ("train", "val", "search", "test")
EMBEDDED = {name for name, found in data.DATA_SETS.items() if not found.layout}


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    """Return a built-in task with its data; skip if they are not found."""
    name = request.param
    if TASKS[name].data in EMBEDDED:
        return tasks.get(name)
    return tasks.get(name, data_root=request.getfixturevalue("data_root"))


@pytest.fixture(scope="module")
def light(task: Task) -> Task:
    """Return the task, on embedded data where the real ones would take long."""
    return tasks.get(task.name, embedded=True) if task.small else task


def _make(task: Task, seed: int) -> BilevelProblem:
    return task.make_problem(task.default_config, "cpu", seed)


@pytest.fixture(scope="module")
def problem(task: Task) -> BilevelProblem:
    """Return the task's problem of seed 0; no test may step it."""
    return _make(task, 0)


def _tensors(loader: Loader | None) -> tuple[Tensor, ...]:
    assert isinstance(loader, Batches)
    return loader.tensors


def test_declared_sizes_are_those_of_the_problem(task: Task, problem: BilevelProblem) -> None:
    problem.validate()
    assert asdict(task.sizes) == {
        "weights": sum(w.numel() for w in problem.weights()),
        "hypers": sum(h.numel() for h in problem.hypers()),
        **{name: len(_tensors(getattr(problem.splits, name))[0]) for name in SPLITS},
    }


def _pixels(inputs: Tensor) -> list[bytes]:
    """Return each image as bytes, whether its pixels are in [-1, 1] or in [0, 1]."""
    unit = inputs if float(inputs.min()) >= 0.0 else (inputs + 1.0) / 2.0
    return [row.tobytes() for row in (unit * 255.0).round().to(torch.uint8).numpy()]


def test_no_image_is_in_two_splits(light: Task) -> None:
    images = data.load(light.data, root=light.data_root, embedded=light.embedded)
    if not isinstance(images, Images):
        return  # texts and tables are cut in their own ways, and tested there
    problem = _make(light, 0)
    parts = (images.train(slice(None)), images.test())
    there = Counter(_pixels(torch.cat([pixels.flatten(1) for pixels, _ in parts])))
    used: Counter[bytes] = Counter()
    for name in SPLITS:
        used.update(_pixels(_tensors(getattr(problem.splits, name))[0].flatten(1)))
    assert used <= there  # as multisets: each example of the data set is used at most once


def test_curvature_batches_are_training_data(problem: BilevelProblem) -> None:
    if problem.splits.curvature is None:
        return
    pairs = zip(_tensors(problem.splits.curvature), _tensors(problem.splits.train), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def _content(problem: BilevelProblem) -> list[Tensor]:
    """Return everything a seed decides, the first batch included."""
    splits = [t for name in SPLITS for t in _tensors(getattr(problem.splits, name))]
    (first, *_) = list(problem.splits.train)
    return [t.detach() for t in (*problem.weights(), *problem.hypers(), *splits, *first)]


def test_equal_seeds_give_equal_problems_and_others_others(light: Task) -> None:
    before = torch.get_rng_state()
    one, same, other = (_content(_make(light, seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])  # the initial weights
    assert not torch.equal(one[-3], other[-3])  # the images of the first batch


def test_two_outer_steps_run(light: Task) -> None:
    joint = JointOptimizer(_make(light, 0), light.default_config)
    for _ in range(2):
        metrics = joint.step()
    found = metrics | joint.evaluate("search") | joint.evaluate("test") | joint.problem.summary()
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert metrics["skipped"] == 0.0
    kind = light.target.metric.rpartition("_")[2]
    assert {f"{split}_{kind}" for split in SPLITS} <= set(found)


def test_tasks_travel_by_pickle(task: Task) -> None:
    again = pickle.loads(pickle.dumps(task))
    assert again == task
    assert pickle.loads(pickle.dumps(task.make_problem)).__self__ == task


def test_a_description_has_the_facts(task: Task) -> None:
    text = task.describe()
    for fact in (task.name, task.summary, task.data, task.target.metric, task.target.reason):
        assert fact in text
    for number in asdict(task.sizes).values():
        assert f"{number:,}" in text
    assert f"{task.target.value:g}" in text


def test_targets_are_columns_of_the_tables(task: Task) -> None:
    retrained = {"retrained_test_error", "retrained_test_loss"}
    assert task.target.metric in {*METRIC_COLUMNS, *retrained}
    assert 0.0 <= task.target.value < 1.0


def test_names_are_keys() -> None:
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits-cleaning'"):
        tasks.get("digit-cleaning")


def test_a_relative_data_root_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert tasks.get("mnist-overfit", data_root="data").data_root == "/data"
    assert tasks.get("mnist-overfit").data_root is None


@pytest.mark.parametrize("name", sorted(n for n, t in TASKS.items() if t.data not in EMBEDDED))
@pytest.mark.parametrize("where", ["nowhere", "environment", "argument"])
def test_missing_data_are_one_line_that_names_both_ways(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    if where == "environment":
        monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    task = tasks.get(name, data_root=tmp_path if where == "argument" else None)
    with pytest.raises(DataNotFoundError) as caught:
        _make(task, 0)
    message = str(caught.value)
    assert "--data-root" in message
    assert data.DATA_VARIABLE in message
    assert "--download" in message
    assert "\n" not in message
    assert where == "nowhere" or str(tmp_path) in message


def test_the_environment_names_the_data(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(data_root))
    images = data.load("mnist", root=None, download=False)
    inputs, _ = images.train(slice(None))
    assert (tuple(inputs.shape), images.shape) == ((60_000, 1, 28, 28), (1, 28, 28))
    assert len(images.test_pixels) == 10_000
    assert (float(inputs.min()), float(inputs.max())) == (-1.0, 1.0)


def test_corruption_redraws_a_fraction_of_the_labels() -> None:
    targets = torch.arange(10_000) % 10
    spoiled = corrupt(targets, 0.5, seed=1)
    assert torch.equal(spoiled, corrupt(targets, 0.5, seed=1))
    assert not torch.equal(spoiled, corrupt(targets, 0.5, seed=2))
    wrong = float((spoiled != targets).float().mean())
    assert wrong == pytest.approx(0.45, abs=0.02)  # one redrawn in ten is right by chance
    assert torch.equal(corrupt(targets, 0.0, seed=1), targets)
    assert torch.equal(targets, torch.arange(10_000) % 10)


def test_cleaning_knows_which_labels_are_true() -> None:
    problem = _make(TASKS["digits-cleaning"], 0)
    assert isinstance(problem, CleaningProblem)
    share = float(problem.clean.float().mean())
    assert share == pytest.approx(1.0 - 0.9 * CORRUPTED, abs=0.06)
    found = problem.summary()
    assert found["weight_of_clean"] == pytest.approx(found["weight_of_corrupted"])
