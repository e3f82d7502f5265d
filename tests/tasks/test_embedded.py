"""Every task runs on embedded data: no file, no network, little time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ift_tune import JointOptimizer, UsageError, tasks
from ift_tune.base.views import View, pack, unpack
from ift_tune.tasks import TASKS, Task
from ift_tune.tasks import datasets as data


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    return tasks.get(request.param, embedded=True)


def test_three_outer_steps_run_and_show_what_was_learned(task: Task) -> None:
    config = replace(task.default_config, inner_steps=1)
    problem = task.make_problem(config, "cpu", 0)
    joint = JointOptimizer(problem, config)
    before = [h.detach().clone() for h in problem.hypers()]
    for _ in range(3):
        metrics = joint.step()
    assert joint.outer_steps == 3
    assert all(math.isfinite(value) for value in metrics.values())
    moved = zip(before, problem.hypers(), strict=True)
    assert any(not bool((old == new).all()) for old, new in moved)
    assert problem.summary()
    assert all(math.isfinite(value) for value in problem.summary().values())
    views: list[View] = problem.views()
    assert views
    assert [v.title for v in unpack(pack(views))] == [v.title for v in views]
    assert len(pack(views)) < 400_000  # they travel in the tables


def test_it_is_declared(task: Task) -> None:
    assert task.embedded
    assert task.data in data.DATA_SETS
    assert set(task.small) <= set(task.options())


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
