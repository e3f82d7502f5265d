"""``ift-tune tasks``."""

import json

import typer

from ift_tune import tasks
from ift_tune.cli.options import AsJson
from ift_tune.cli.printing import task_facts


def list_tasks(as_json: AsJson = False) -> None:
    """Show what is built in, with data, sizes and targets."""
    if as_json:
        typer.echo(json.dumps([task_facts(t) for t in tasks.TASKS.values()], indent=1))
        return
    for task in tasks.TASKS.values():
        typer.echo(task.describe())
