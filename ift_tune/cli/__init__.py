"""The command line: ``ift-tune`` with tasks, check, run, search, refit, certify, audit and so on.

Its modules import the rest of the package inside the commands, when it is known which one is run:
PyTorch alone takes longer to import than ``--help``, ``tasks`` and ``report`` may take in all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import ift_tune
from ift_tune.base.errors import EnvironmentFaultError, IFTTuneError, Interrupted, UsageError
from ift_tune.base.urls import blotted
from ift_tune.cli import audit, certify, compare, refit, report, run, search, studies
from ift_tune.cli.configured import ConfiguredCommand

TRY = """\
ift-tune tunes hyperparameters by gradients inside each trial, and searches what is left outside.

Try, on data that come with it:
  ift-tune run digits-cleaning --out runs/clean       learn which labels to trust, in seconds
  ift-tune search digits-weight-decay --n-trials 10   an Optuna search around such runs
With a problem of your own, make_problem in mine.py:
  ift-tune check mine:make_problem                    is it right, and how dear will it be

ift-tune tasks lists what is built in, ift-tune --help the commands, ift-tune run --help the flags
of one. ift-tune --install-completion lets your shell complete them."""

INTERRUPTED_STATUS = 130  # 128 + SIGINT, as a shell says it

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Gradient-based hyperparameter optimisation in each trial, black-box search outside.",
)


def _add(
    command: Callable[..., None], *examples: str, name: str | None = None, plain: bool = False
) -> None:
    """Add a command, with examples below its help.

    Args:
        command: The function.
        examples: Of its use, each a whole command line.
        name: Of the command, unless it is the function's.
        plain: Whether it has no settings that a file could hold.
    """
    kind = TyperCommand if plain else ConfiguredCommand
    shown = "\n\n".join(["For example:", *examples])  # a paragraph each, to stay a line each
    app.command(name, cls=kind, epilog=shown)(command)


_add(run.list_tasks, "ift-tune tasks", name="tasks", plain=True)
_add(
    run.run,
    "ift-tune run digits-weight-decay --outer-steps 30 --set terms=3 --out runs/first",
    "ift-tune run mine:make_problem --patience 10 --dump-config mine.yaml",
)
_add(
    search.search,
    "ift-tune search digits-cleaning --n-trials 10 --vary terms=0:20 --vary meta_lr=.01:1:log",
    "ift-tune search mine:make_problem --sampler nsgaii --metric search_error "
    "--metric gradient_equivalents",
)
_add(
    compare.compare,
    "ift-tune compare digits-weight-decay --arms ift,random,tpe --seeds 5 --out runs/compared",
)
_add(refit.refit, "ift-tune refit runs/first --data train+val")
_add(certify.certify, "ift-tune certify runs/first --directions 4")
_add(
    audit.audit,
    "ift-tune run digits-cleaning --out runs/clean",
    "ift-tune audit runs/clean --seeds 3",
)
_add(studies.study_inverse, "ift-tune study-inverse digits-weight-decay --terms 0,1,5,20")
_add(studies.study_cost, "ift-tune study-cost digits-weight-decay --terms 0,5 --widths 32,128")
_add(studies.study_validation, "ift-tune study-validation --seeds 3 --totals 100,200")
_add(studies.study_worth, "ift-tune study-worth --quick --workers 2")
_add(report.report, "ift-tune report runs/compared", plain=True)
_add(run.check, "ift-tune check mine:make_problem", "ift-tune check digits-cleaning --plan")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ift-tune {ift_tune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options before the command; without one, say what to try."""
    if context.invoked_subcommand is None:
        typer.echo(TRY)


@functools.cache
def _command_line() -> Callable[..., Any]:
    """Return what `app` amounts to: to read all its signatures takes longer than many a command."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; exit status 0 done, 2 usage error, 1 failure, 130 interrupted."""
    try:
        with _warnings_on_stderr():
            status = _command_line()(prog_name="ift-tune", standalone_mode=False)
    except (UsageError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        sys.exit(_complain(text, 2))
    except EnvironmentFaultError as error:
        sys.exit(_complain(str(error), 1))
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        text = str(error) or "interrupted before there was anything to go on with"
        sys.exit(_complain(text, INTERRUPTED_STATUS))
    except IFTTuneError as error:
        sys.exit(_complain(str(error), 1))
    sys.exit(status if isinstance(status, int) else 0)


def _complain(text: str, status: int) -> int:
    if text:  # empty when there were no arguments and the help was shown
        typer.echo(f"ift-tune: {blotted(text, sys.argv[1:])}", err=True)
    return status


class _OneLineHandler(logging.Handler):
    """Writes each record as one line on standard error, as it is at that moment.

    Rich puts an object of its own in the place of `sys.stderr` while it shows a progress bar, so
    that lines appear above the bar.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        text = blotted(record.getMessage(), sys.argv[1:])
        sys.stderr.write(f"ift-tune: {' '.join(text.split())}\n")


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show what the package's loggers warn of; other libraries' loggers are left as they are."""
    logger, handler = logging.getLogger("ift_tune"), _OneLineHandler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
