"""``ift-tune check`` and ``ift-tune tasks``: before anything is run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
    find_job,
)

if TYPE_CHECKING:
    from ift_tune.tasks import Task


def list_tasks(as_json: AsJson = False) -> None:
    """Show what is built in, with data, sizes and targets."""
    from ift_tune import tasks

    if as_json:
        typer.echo(json.dumps([_task_facts(task) for task in tasks.TASKS.values()], indent=1))
        return
    for task in tasks.TASKS.values():
        typer.echo(task.describe())


def _task_facts(task: Task) -> dict[str, Any]:
    """Return what a task declares, as plain values."""
    return {
        "name": task.name,
        "summary": task.summary,
        "data": task.data,
        **asdict(task.sizes),
        "target": asdict(task.target),
        "options": task.options(),
        "default_config": dict(task.settings),
    }


def check(
    task: TaskName,
    settings: Settings = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Say whether a problem is differentiable, its hypergradient right, and how dear it is."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.testing import check_hypergradient
    from ift_tune.testing.price import measure_price

    job = find_job(task, settings, data_root, download, embedded, options)
    where = resolve_device(device)
    typer.echo(str(measure_price(job.factory(job.config, where, seed), job.config)))
    typer.echo(str(check_hypergradient(job.factory(job.config, where, seed), seed=seed)))
