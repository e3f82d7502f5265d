"""``--dump-config``: the settings of a command as a configuration file, with what each one is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ift_tune.base.errors import UsageError
from ift_tune.base.files import write_atomically
from ift_tune.cli.config_files import as_yaml
from ift_tune.cli.options import find_job
from ift_tune.cli.settings import Setting

if TYPE_CHECKING:
    from ift_tune.cli.options import Job

STDOUT = "-"
_LENGTHS = ("outer_steps", "budget", "seconds")


def dump(command: str, settings: Sequence[Setting], values: Mapping[str, Any], place: str) -> None:
    """Print or write the settings of a command.

    Args:
        command: Its name.
        settings: Which it has.
        values: What they come to, by the names of its parameters.
        place: The file, or ``-``.

    Raises:
        UsageError: If the file is there already or is no YAML file, or there is no such task.
    """
    path = Path(place)
    if place != STDOUT and path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--dump-config writes YAML: name a FILE.yaml, got {place!r}")
    if place != STDOUT and path.exists():
        raise UsageError(f"--dump-config overwrites nothing: name another file than {place!r}")
    job = _job(values)
    lines = [
        f"# ift-tune {command} --config FILE: flags on the command line stand instead of these.",
        *(line for setting in settings for line in _lines(setting, values, job)),
    ]
    text = "\n".join(lines) + "\n"
    if place == STDOUT:
        typer.echo(text, nl=False)
        return
    write_atomically(path, text.encode())
    typer.echo(f"settings: {place}; use them: ift-tune {command} --config {place}")


def _job(values: Mapping[str, Any]) -> Job | None:
    """Return what the task of a command is with these settings; None of one that has no task."""
    known = ("settings", "data_root", "download", "embedded", "options")
    if not values.get("task") or any(name not in values for name in known):
        return None
    return find_job(values["task"], *(values[name] for name in known))


def _lines(setting: Setting, values: Mapping[str, Any], job: Job | None) -> Iterator[str]:
    value = setting.plain(values[setting.name])
    yield ""
    yield from textwrap.wrap(setting.help, 98, initial_indent="# ", subsequent_indent="# ")
    yield from as_yaml({setting.key: value})
    more = _of_the_task(setting, values, job)
    if more:
        yield "# of the task, where nothing else is said:"
        yield from (f"#  {line}" for line in as_yaml(more))


def _of_the_task(setting: Setting, values: Mapping[str, Any], job: Job | None) -> Mapping[str, Any]:
    """Return what a setting comes to by the task alone, as plain values."""
    if job is None:
        return {}
    if setting.name == "settings":
        chosen = setting.plain(values["settings"])
        return {key: each for key, each in job.config.to_flat().items() if key not in chosen}
    if setting.name == "outer_steps" and all(values.get(name) is None for name in _LENGTHS):
        limits = {k.replace("_", "-"): v for k, v in job.budget.to_plain().items() if v is not None}
        return {key: limits[key] for key in ("outer-steps", "seconds") if key in limits}
    return {}
