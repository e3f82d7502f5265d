"""The factory of a finished run, found by what the run has noted of it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from ift_tune import tasks
from ift_tune.base.errors import UsageError
from ift_tune.base.identity import module_name
from ift_tune.problem.factory import require_factory
from ift_tune.search.space import parse_value
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory


def noted_task(run: RunDirectory) -> tuple[str, bool, list[str]] | None:
    """Return the TASK, whether it was embedded and with which options, as a run has noted it.

    None if its factory cannot be named: it stands inside a function, say, and the run was not begun
    by a command that names it.
    """
    settings = run.settings()
    label, factory = str(settings.get("task", "")), str(settings.get("factory", ""))
    built_in = re.search(r":Task\.make_problem\((.*)\)$", factory)
    if built_in and built_in[1] in tasks.TASKS:
        embedded, *options = re.split(r"-(?=\w+=)", label.removeprefix(built_in[1]))
        return built_in[1], embedded == "-embedded", options
    if re.fullmatch(r"[\w.]+:\w+", factory):
        return factory, False, []
    # A function within another has no name of its own, and may have been given one in a module:
    # `small = make(width=16)`, named so on the command line that made the run.
    for given in run.command().values():
        name = str(given.get("task", ""))
        if re.fullmatch(r"[\w.]+:\w+", name):
            return name, False, []
    return None


def noted_factory(run_dir: str | os.PathLike[str]) -> ProblemFactory:
    """Return the factory that a run was made with: of a built-in task, or one that is importable.

    Raises:
        UsageError: If it cannot be found so.
    """
    run = RunDirectory(run_dir, resume=True)
    settings, noted = run.settings(), noted_task(run)
    if noted is None:
        raise _unknown(settings, "no module and name")
    name, embedded, texts = noted
    if ":" not in name:
        pairs = (text.partition("=") for text in texts)
        options = {key: parse_value(value) for key, _, value in pairs}
        return tasks.get(name, embedded=embedded, options=options).make_problem
    module, _, attribute = name.partition(":")
    try:
        # What runs now may be the very script: imported, it would run a second time.
        own = module_name("__main__") == module
        home = sys.modules["__main__"] if own else importlib.import_module(module)
        factory = getattr(home, attribute)
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise _unknown(settings, f"{type(error).__name__}: {error}") from error
    require_factory(factory, name)
    found: ProblemFactory = factory
    return found


def _unknown(settings: Mapping[str, Any], reason: str) -> UsageError:
    made = settings.get("factory") or "a factory that it did not note"
    return UsageError(
        f"the run was made by {made}, which cannot be imported here: give make_problem, that "
        f"factory (on the command line, TASK or MODULE:FACTORY), got {reason}"
    )
