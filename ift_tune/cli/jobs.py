"""What a command line means by TASK and its options: a problem factory with settings and length."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ift_tune import tasks
from ift_tune.base.errors import UsageError, nearest
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.space import parse_value
from ift_tune.trial.trial import ProblemFactory

DEFAULT_BUDGET = Budget(outer_steps=50)


@dataclass(frozen=True)
class Job:
    """A built-in task or the user's own factory, with the settings of one call.

    Attributes:
        name: For the tables and the run directory.
        factory: Builds the problem.
        config: The meta-hyperparameters.
        budget: Length of a trial.
        target: When it is solved; None for the user's own.
    """

    name: str
    factory: ProblemFactory
    config: MetaConfig
    budget: Budget
    target: tasks.Target | None

    def limited_to(
        self, outer_steps: int | None, gradient_equivalents: float | None, seconds: float | None
    ) -> Job:
        """Return the job with the length given on the command line, if one is."""
        budget = self.budget.limited_to(
            outer_steps=outer_steps, gradient_equivalents=gradient_equivalents, seconds=seconds
        )
        return replace(self, budget=budget)


def find_job(
    name: str,
    settings: Sequence[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    embedded: bool = False,
    options: Sequence[str] | None = None,
) -> Job:
    """Return the job for a TASK argument.

    Args:
        name: A built-in task, or ``MODULE:FACTORY``, looked up from the present directory too.
        settings: ``KEY=VALUE`` texts that change the default configuration.
        data_root: Where data sets lie.
        download: Whether they may be fetched.
        embedded: Whether embedded data stands in for a built-in task's.
        options: ``KEY=VALUE`` texts that change a built-in task's options.

    Raises:
        UsageError: If there is no such task, module, function, key or option.
    """
    changes = {key: parse_value(text) for key, text in pairs("--set", settings).items()}
    chosen = {key: parse_value(text) for key, text in pairs("--option", options).items()}
    if ":" not in name:
        task = tasks.get(
            name, data_root=data_root, download=download, embedded=embedded, options=chosen
        )
        config = task.default_config.updated(changes)
        # The name tells the tables, and --resume, that this is not the task as declared.
        label = "-".join([name, *["embedded"] * embedded, *(f"{k}={v}" for k, v in chosen.items())])
        target = None if embedded else task.target
        return Job(label, task.make_problem, config, task.budget, target)
    if embedded or chosen:
        raise UsageError("--embedded and --option are for built-in tasks")
    factory = _import_factory(name)
    label = name.replace(":", ".").replace(os.sep, ".")
    return Job(label, factory, MetaConfig().updated(changes), DEFAULT_BUDGET, None)


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """Return ``["a=1", "b=2"]`` as a dictionary.

    Raises:
        UsageError: If a text has no ``=``.
    """
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option} takes KEY=VALUE, got {text!r}")
        found[key] = value
    return found


def _import_factory(name: str) -> ProblemFactory:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(
            f"there is no module {module_name!r}: write MODULE:FACTORY, as in package.module:make"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that a script beside the user is found
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"there is no module {module_name!r} here; name it as python -m would, or use a "
            f"built-in task: {', '.join(tasks.TASKS)}"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise UsageError(f"{module_name} has no function {attribute!r}{nearest(attribute, known)}")
    found: ProblemFactory = factory
    return found
