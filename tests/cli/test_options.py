"""What a command line means by TASK and its options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ift_tune import Budget, MetaConfig, MetaSpace, UsageError, tasks
from ift_tune.cli.options import DEFAULT_OUTER_STEPS, find_job, pairs

FACTORY = """
from ift_tune.testing.problems import Quadratic

def make_problem(config, device, seed):
    return Quadratic(seed=seed)

def _helper():
    pass

number = 3
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty directory, and leave `sys.path` as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_built_in_task_brings_its_settings(name: str) -> None:
    job, task = find_job(name), tasks.get(name)
    assert (job.name, job.config, job.budget, job.target) == (
        name,
        task.default_config,
        task.budget,
        task.target,
    )


def test_settings_change_the_tasks_own_defaults() -> None:
    job = find_job("digits-cleaning", ["terms=3", "alpha=0.5", "inner_optimizer=sgd"])
    flat = tasks.get("digits-cleaning").default_config.to_flat()
    changed = {"terms": 3, "alpha": 0.5, "inner_optimizer": "sgd"}
    assert job.config.to_flat() == flat | changed


def test_the_data_root_reaches_the_task(tmp_path: Path) -> None:
    job = find_job("mnist-overfit", data_root=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"nowhere.*--data-root.*--download"):
        job.factory(job.config, torch.device("cpu"), 0)


def test_a_factory_beside_the_user_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_jobs_problem.py").write_text(FACTORY)
    job = find_job("my_jobs_problem:make_problem", ["meta_lr=0.5"])
    assert job.name == "my_jobs_problem.make_problem"
    assert job.config == MetaConfig(meta_lr=0.5)
    assert (job.budget, job.target) == (Budget(outer_steps=DEFAULT_OUTER_STEPS), None)
    assert len(job.factory(job.config, torch.device("cpu"), 0).weights()) == 1


def test_a_factory_in_a_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_jobs_package").mkdir()
    (tmp_path / "my_jobs_package" / "inner.py").write_text(FACTORY)
    assert find_job("my_jobs_package.inner:make_problem").name == (
        "my_jobs_package.inner.make_problem"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits-weight-dekay", "did you mean 'digits-weight-decay'"),
        ("", "there is no task"),
        ("no_such_module:make", "no module 'no_such_module'.*digits-weight-decay"),
        ("my_bad_jobs:make_problm", "did you mean 'make_problem'"),
        ("my_bad_jobs:number", "has no function 'number'"),
        ("my_bad_jobs:", "has no function ''"),
        ("my_bad_jobs.py:make_problem", "without .py: write my_bad_jobs:make_problem, got"),
        ("./my_bad_jobs.py:make_problem", "no module"),
        (":make_problem", "no module"),
    ],
)
def test_a_task_that_is_not_there_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my_bad_jobs.py").write_text(FACTORY)
    with pytest.raises(UsageError, match=message):
        find_job(name)


def test_a_module_that_misses_another_is_told_where(tmp_path: Path) -> None:
    (tmp_path / "my_needy_job.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(UsageError, match=r"my_needy_job.py, line 1, got .*no_such_thing_at_all"):
        find_job("my_needy_job:make")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tems=3", "did you mean 'terms'"),
        ("terms", "takes KEY=VALUE, got 'terms'"),
        ("terms=", "takes KEY=VALUE"),
        ("=3", "takes KEY=VALUE"),
        ("terms=few", "terms must be an integer"),
        ("inner_steps=0", "inner_steps must be an integer of at least 1"),
        ("damping=1", "belongs to the inverse"),
        ("inverse=neuman", "did you mean 'neumann'"),
    ],
)
def test_a_bad_setting_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_job("digits-cleaning", [setting])


def test_pairs() -> None:
    assert pairs("--set", None) == {}
    assert pairs("--set", ["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}


@pytest.mark.parametrize("option", ["--set", "--vary", "--option"])
def test_a_key_that_is_given_twice_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} a is given twice: .* got '1' and '2'"):
        pairs(option, ["a=1", "b=3", "a=2"])


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan"])
def test_nan_is_not_taken_for_the_default(text: str) -> None:
    with pytest.raises(UsageError, match="meta_lr takes a value: leave it out for the default"):
        find_job("digits-weight-decay", settings=[f"meta_lr={text}"])
    with pytest.raises(UsageError, match="width takes a value: leave it out for the default"):
        find_job("digits-weight-decay", options=[f"width={text}"])


def test_a_choice_of_nan_is_refused() -> None:
    with pytest.raises(UsageError, match="NaN is none"):
        MetaSpace.parse({"meta_lr": "0.1,nan"})


def test_a_length_on_the_command_line_replaces_the_tasks_own() -> None:
    job = find_job("mnist-cleaning")
    assert job.limited_to() == job
    assert job.limited_to(3).budget == Budget(outer_steps=3, eval_every=5)
    by_cost = Budget(gradient_equivalents=9.0, eval_every=5)
    assert job.limited_to(None, 9.0, None).budget == by_cost
    both = Budget(outer_steps=3, seconds=2.0, eval_every=5)
    assert job.limited_to(3, None, 2.0).budget == both
    with pytest.raises(UsageError, match="outer_steps"):
        job.limited_to(0)
