"""The options that several commands share, and what they mean by TASK: a factory with settings."""

from __future__ import annotations

import importlib
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ift_tune.base.arguments import expanded
from ift_tune.base.errors import UsageError, nearest
from ift_tune.cli import values as known

if TYPE_CHECKING:
    from ift_tune.joint.budget import Budget
    from ift_tune.joint.config import MetaConfig
    from ift_tune.joint.flat import FlatValue
    from ift_tune.tasks import Target
    from ift_tune.trial.trial import ProblemFactory

OPTUNA, RAY = "with --backend optuna", "with --backend ray"  # panels of the help

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="a built-in task, which `ift-tune tasks` lists, or MODULE:FACTORY",
        autocompletion=known.task_names,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"a meta-hyperparameter, user.NAME or one of {', '.join(known.KEYS)}; may be repeated",
        autocompletion=known.keys,
    ),
]
OuterSteps = Annotated[int | None, typer.Option(help="length of a trial in outer steps")]
BudgetGE = Annotated[
    float | None, typer.Option("--budget", help="length of a trial in gradient-equivalents")
]
Seconds = Annotated[float | None, typer.Option(help="length of a trial in seconds")]


def of_home(path: Path | None) -> Path | None:
    """Return a path with the home directory for its ``~``, which a quoted one still has."""
    return None if path is None else expanded(path)


Out = Annotated[
    Path | None, typer.Option(help="run directory; default runs/TASK-seedN", callback=of_home)
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="where data sets lie; default $IFT_TUNE_DATA", callback=of_home),
]
Download = Annotated[bool, typer.Option("--download", help="fetch missing data into --data-root")]
Embedded = Annotated[
    bool, typer.Option("--embedded", help="try the task on small embedded data, no files needed")
]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="of the task itself, see `tasks`; may be repeated"
    ),
]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda or cuda:N", autocompletion=known.words(*known.DEVICES)),
]
Seed = Annotated[int, typer.Option(help="of splits, weights, order of batches and sampler")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="go on with a study whose pickles others may have written: they are run"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Exact = Annotated[
    bool | None,
    typer.Option(
        "--exact/--no-exact",
        help="compare with re-solved inner problems; default: where that takes seconds",
    ),
]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="measure also what takes more than seconds")
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="search metric that decides: search_error, search_loss or what the problem measures "
        "as search_NAME; default search_error or search_loss",
        autocompletion=known.metrics,
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        help="min or max: which values of the metric are better; default min",
        autocompletion=known.words(*known.MODES),
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(help="outer steps after the best evaluation after which a trial ends"),
]
NoBaseline = Annotated[
    bool,
    typer.Option("--no-baseline", help="leave out the plain training, λ as the task has it"),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="search metric that decides; default search_error or search_loss; may be repeated: "
        "further ones are any columns of the trials, as gradient_equivalents",
        autocompletion=known.words(*known.METRICS, *known.COSTS),
    ),
]
Modes = Annotated[
    list[str] | None,
    typer.Option(
        "--mode",
        help="min or max: which values of the metric are better; default min; one for each metric",
        autocompletion=known.words(*known.MODES),
    ),
]
Constraints = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint",
        metavar="COLUMN<=NUMBER",
        help="what the best trial keeps, as alpha_lambda_max<=2 or >=; may be repeated",
        autocompletion=known.words(*known.COSTS, "alpha_lambda_max", end="<="),
    ),
]
GpusPerTrial = Annotated[
    float | None,
    typer.Option(help="1, a part of 1 to share a GPU, or 0; a search's trial takes several too"),
]
ProcessesPerTrial = Annotated[
    int | None,
    typer.Option(help="that share a trial's batches, on a GPU each or on the cores; default 1"),
]
Workers = Annotated[
    int | None, typer.Option(help="optuna: processes side by side", rich_help_panel=OPTUNA)
]
Pack = Annotated[
    int | None,
    typer.Option(
        help="optuna: small trials that advance together on a device; 16 or more pay",
        rich_help_panel=OPTUNA,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="ray: of a cluster; default: start one here", rich_help_panel=RAY),
]
CpusPerTrial = Annotated[
    float | None, typer.Option(help="ray: cores of a trial", rich_help_panel=RAY)
]

DEFAULT_OUTER_STEPS = 50


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
    target: Target | None

    @property
    def inner_steps(self) -> int:
        """Weight updates of one run of the task in all."""
        return self.config.inner_steps * (self.budget.outer_steps or DEFAULT_OUTER_STEPS)

    def limited_to(
        self,
        outer_steps: int | None = None,
        gradient_equivalents: float | None = None,
        seconds: float | None = None,
        patience: int | None = None,
    ) -> Job:
        """Return the job with the length given on the command line, if one is."""
        budget = self.budget.limited_to(
            outer_steps=outer_steps, gradient_equivalents=gradient_equivalents, seconds=seconds
        )
        if patience is not None:
            budget = replace(budget, patience=patience)
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
    from ift_tune import tasks
    from ift_tune.joint.budget import Budget
    from ift_tune.joint.config import MetaConfig

    changes = values("--set", settings)
    chosen = values("--option", options)
    if ":" not in name:
        if name not in tasks.TASKS:
            raise UsageError(
                f"there is no task {name!r}, and a problem of your own is named MODULE:FACTORY"
                f"{nearest(name, tasks.TASKS)}"
            )
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
    budget = Budget(outer_steps=DEFAULT_OUTER_STEPS)
    return Job(label, factory, MetaConfig().updated(changes), budget, None)


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """Return ``["a=1", "b=2"]`` as a dictionary.

    Raises:
        UsageError: If a text has no ``=``, or a key is there twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option} takes KEY=VALUE, got {text!r}")
        if key in found:
            raise UsageError(
                f"{option} {key} is given twice: keep one of them, got {found[key]!r} and {value!r}"
            )
        found[key] = value
    return found


def values(option: str, texts: Sequence[str] | None) -> dict[str, FlatValue]:
    """Return ``["a=1", "b=word"]`` as values by key.

    Raises:
        UsageError: If a text has no ``=``, a key is there twice, or a value is not a number:
            tables write what is missing so, and a command line has nothing missing.
    """
    from ift_tune.search.space import parse_value

    found = {key: parse_value(text) for key, text in pairs(option, texts).items()}
    for key, value in found.items():
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(
                f"{option} {key} takes a value: leave it out for the default, got {key}={value}"
            )
    return found


def _import_factory(name: str) -> ProblemFactory:
    from ift_tune import tasks
    from ift_tune.problem.factory import require_factory

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
            raise _not_imported(module_name, error) from error
        if module_name.endswith(".py"):
            raise UsageError(
                f"a module is named without .py: write {module_name[:-3]}:{attribute}, got {name!r}"
            ) from error
        raise UsageError(
            f"there is no module {module_name!r} here: give the command where its file lies, and "
            f"name it as python -m would, or use a built-in task: {', '.join(tasks.TASKS)}"
        ) from error
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise _not_imported(module_name, error) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise UsageError(f"{module_name} has no function {attribute!r}{nearest(attribute, known)}")
    require_factory(factory, name)
    found: ProblemFactory = factory
    return found


def _not_imported(module: str, error: BaseException) -> UsageError:
    """Return what to raise where the user's module cannot be imported: what happened and where."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [number for number, frame in enumerate(frames) if _is_of_a_user(frame.filename)]
    where = frames[theirs[-1] if theirs else -1]
    line = f"{where.filename}, line {where.lineno}"
    if isinstance(error, SyntaxError):
        line = f"{error.filename}, line {error.lineno}"
    mend = f"mend {line}"
    if theirs and any(_is_in_package(frame.filename) for frame in frames[theirs[-1] + 1 :]):
        mend = f'put what runs in it under `if __name__ == "__main__":`, see {line}'
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return UsageError(f"{module} cannot be imported: {mend}, got {what}")


def _is_in_package(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parents[1])


def _is_of_a_user(file: str) -> bool:
    """Return whether a file is neither Python's, nor a library's, nor ours."""
    installed = [Path(folder) for folder in sysconfig.get_paths().values()]
    known = any(Path(file).is_relative_to(folder) for folder in installed)
    return not known and not file.startswith("<") and not _is_in_package(file)
