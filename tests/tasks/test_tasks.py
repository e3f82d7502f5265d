"""Every built-in task keeps the laws of the family, and what all share does what it says."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ift_tune import Batches, BilevelProblem, UsageError, tasks
from ift_tune.base.errors import DataNotFoundError
from ift_tune.problem.batches import Loader
from ift_tune.tasks import TASKS, Task
from ift_tune.tasks import datasets as data
from ift_tune.tasks.building import corrupt
from ift_tune.tasks.cleaning import CORRUPTED
from ift_tune.tasks.datasets import Images
from ift_tune.tasks.problems import CleaningProblem
from ift_tune.testing.contracts import check_task
from ift_tune.trial.tables import METRIC_COLUMNS

SPLITS = ("train", "val", "search", "test")


def needs_files(task: Task) -> bool:
    return (task.source or data.DATA_SETS[task.data]).read is not None


LARGE = sorted(name for name in TASKS if name.startswith("cifar10"))
FROM_FILES = sorted(name for name, task in TASKS.items() if needs_files(task))


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


@pytest.fixture
def light(task: Task) -> Task:
    """The task, on embedded data where the real ones would take long or need files."""
    return task.on_embedded_data() if needs_files(task) else task


def _make(task: Task, seed: int) -> BilevelProblem:
    return task.make_problem(task.default_config, "cpu", seed)


def _tensors(loader: Loader | None) -> tuple[Tensor, ...]:
    assert isinstance(loader, Batches)
    return loader.tensors


@pytest.mark.parametrize(
    "task",
    [pytest.param(n, marks=pytest.mark.nightly) if n in LARGE else n for n in sorted(TASKS)],
    indirect=True,
)
def test_task_keeps_the_laws(
    task: Task, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them where its data are found, else all but that of its sizes."""
    try:
        root = request.getfixturevalue("data_root") if needs_files(task) else None
    except pytest.skip.Exception:
        check_task(task.on_embedded_data())
        raise
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    check_task(tasks.get(task.name, data_root=root))


@pytest.mark.parametrize("task", LARGE, indirect=True)
def test_so_does_a_large_task_on_embedded_data(task: Task) -> None:
    check_task(task.on_embedded_data())


def test_settings_are_complete(task: Task) -> None:
    """What is listed without PyTorch is the whole configuration, in its order."""
    assert list(task.settings.items()) == list(task.default_config.to_flat().items())


def _pixels(inputs: Tensor) -> list[bytes]:
    """Return each image as bytes, whether its pixels are in [-1, 1] or in [0, 1]."""
    unit = inputs if float(inputs.min()) >= 0.0 else (inputs + 1.0) / 2.0
    return [row.tobytes() for row in (unit * 255.0).round().to(torch.uint8).numpy()]


def test_no_image_is_in_two_splits(light: Task) -> None:
    problem = _make(light, 0)
    images = data.load(light.data, source=light.source, embedded=True)
    if not isinstance(images, Images):
        return  # texts and tables are cut in their own ways, and tested there
    parts = (images.train(slice(None)), images.test())
    there = Counter(_pixels(torch.cat([pixels.flatten(1) for pixels, _ in parts])))
    used: Counter[bytes] = Counter()
    for name in SPLITS:
        used.update(_pixels(_tensors(getattr(problem.splits, name))[0].flatten(1)))
    assert used <= there  # as multisets: each example of the data set is used at most once


def test_other_seeds_give_other_first_batches(light: Task) -> None:
    one, other = (next(iter(_make(light, seed).splits.train))[0] for seed in (1, 2))
    assert not torch.equal(one, other)


def test_tasks_travel_by_pickle_with_their_options(task: Task) -> None:
    changed = tasks.get(task.name, embedded=True, data_root="here")
    again = pickle.loads(pickle.dumps(changed.make_problem)).__self__
    assert again == changed
    assert again.options() == changed.options()


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
    declared = [
        task.name for experiment in tasks.EXPERIMENTS for task in getattr(tasks, experiment).TASKS
    ]
    assert declared == list(TASKS)  # and none twice


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits-cleaning'"):
        tasks.get("digit-cleaning")


def test_a_relative_data_root_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert tasks.get("mnist-overfit", data_root="data").data_root == "/data"
    assert tasks.get("mnist-overfit").data_root is None


@pytest.mark.parametrize("name", sorted(n for n, t in TASKS.items() if t.options()))
def test_options_change_the_problem_and_are_checked(name: str) -> None:
    task = tasks.get(name)
    option, value = next((k, v) for k, v in task.options().items() if type(v) is int)
    changed = tasks.get(name, options={option: value + 1})
    assert changed.options() == task.options() | {option: value + 1}
    assert tasks.get(name) == task
    with pytest.raises(UsageError, match="has no option"):
        tasks.get(name, options={"no_such_option": 1})
    with pytest.raises(UsageError, match=f"option {option} of {name} is like {value}"):
        tasks.get(name, options={option: "many"})


@pytest.mark.parametrize("name", FROM_FILES)
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


def test_an_unknown_data_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        data.load("digit")


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
