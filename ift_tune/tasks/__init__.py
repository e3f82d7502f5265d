"""Ready problems, each with its splits, target and budget.

A new one is a file here, with its tasks in ``TASKS``, and a line in `EXPERIMENTS`.

Example:
    >>> from ift_tune import tasks
    >>> task = tasks.get("mnist-cleaning", embedded=True)  # digits stand in for MNIST
    >>> task.sizes.hypers, task.target.metric, task.settings["terms"]
    (5001, 'retrained_test_error', 10)
    >>> problem = task.make_problem(task.default_config, "cpu", seed=0)
    >>> sorted(problem.metrics(next(iter(problem.splits.val))))
    ['error', 'loss']
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from ift_tune.base.errors import UsageError, nearest
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.datasets import DataSet

EXPERIMENTS = (
    "weight_decay",
    "cleaning",
    "distillation",
    "augmentation",
    "language",
    "mixture",
    "imbalance",
    "features",
)
"""The files that declare tasks."""

TASKS: dict[str, Task] = {
    task.name: task
    for experiment in EXPERIMENTS
    for task in import_module(f"{__name__}.{experiment}").TASKS
}
"""Every built-in task by name."""


def get(
    name: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    embedded: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """Return a built-in task.

    Args:
        name: One of `TASKS`.
        data_root: Where its data lies; default: the environment's IFT_TUNE_DATA.
        download: Whether missing data may be fetched there.
        embedded: Let embedded data stand in for the task's, so that nothing is read.
        options: Changes to what `Task.options` lists.

    Raises:
        UsageError: If there is no such task or option; the nearest name is given.

    Example:
        >>> from ift_tune import tasks
        >>> tasks.get("digits-distill", options={"per_class": 3}).options()["per_class"]
        3
        >>> tasks.get("text-drop")
        Traceback (most recent call last):
            ...
        ift_tune.base.errors.UsageError: there is no task 'text-drop'; did you mean 'text-dropout'?
    """
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}{nearest(name, TASKS)}")
    # Workers may stand in another folder when they build the problem.
    root = None if data_root is None else os.path.abspath(data_root)
    task = TASKS[name].on_embedded_data() if embedded else TASKS[name]
    return replace(task.with_options(options or {}), data_root=root, download=download)


__all__ = ["EXPERIMENTS", "TASKS", "DataSet", "Sizes", "Target", "Task", "get"]
