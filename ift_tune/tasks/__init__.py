"""Ready problems, each with its splits, target and budget. A new one is a file and a line here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ift_tune.base.errors import UsageError, nearest
from ift_tune.tasks import (
    augmentation,
    cifar,
    cleaning,
    diabetes,
    distillation,
    language,
    overfit,
    weight_decay,
)
from ift_tune.tasks.base import Sizes, Target, Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        weight_decay.DIGITS,
        diabetes.DIABETES,
        cleaning.DIGITS,
        overfit.MNIST,
        cleaning.MNIST,
        distillation.DIGITS,
        distillation.MNIST,
        distillation.MNIST_TEN,
        distillation.CIFAR10,
        augmentation.DIGITS,
        augmentation.DIGITS_AFFINE,
        augmentation.MNIST,
        augmentation.MNIST_AFFINE,
        augmentation.CIFAR10_SMALL,
        augmentation.CIFAR10,
        cifar.OVERFIT,
        cifar.WEIGHT_DECAY,
        language.SEVEN_RATES,
        language.MANY_RATES,
    )
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
    """
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}{nearest(name, TASKS)}")
    root = None if data_root is None else os.path.abspath(data_root)
    task = TASKS[name].on_embedded_data() if embedded else TASKS[name]
    return replace(task.with_options(options or {}), data_root=root, download=download)


__all__ = ["TASKS", "Sizes", "Target", "Task", "get"]
