"""The command line: ``ift-tune`` with tasks, check, run, search, refit, certify, audit and so on.

Its modules import the rest of the package inside the commands, when it is known which one is run:
PyTorch alone takes longer to import than ``--help``, ``tasks`` and ``report`` may take in all.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

import ift_tune
from ift_tune.base.errors import EnvironmentFaultError, IFTTuneError, Interrupted, UsageError
from ift_tune.base.urls import blotted
from ift_tune.cli import audit, certify, compare, refit, report, run, search, studies
from ift_tune.cli.configured import ConfiguredCommand

INTERRUPTED_STATUS = 130  # 128 + SIGINT, as a shell says it

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Gradient-based hyperparameter optimisation in each trial, black-box search outside.",
)
app.command("tasks")(run.list_tasks)
app.command(cls=ConfiguredCommand)(run.run)
app.command(cls=ConfiguredCommand)(search.search)
app.command(cls=ConfiguredCommand)(compare.compare)
app.command(cls=ConfiguredCommand)(refit.refit)
app.command(cls=ConfiguredCommand)(certify.certify)
app.command(cls=ConfiguredCommand)(audit.audit)
app.command("study-inverse", cls=ConfiguredCommand)(studies.study_inverse)
app.command("study-cost", cls=ConfiguredCommand)(studies.study_cost)
app.command("study-validation", cls=ConfiguredCommand)(studies.study_validation)
app.command("study-worth", cls=ConfiguredCommand)(studies.study_worth)
app.command()(report.report)
app.command(cls=ConfiguredCommand)(run.check)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ift-tune {ift_tune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; exit status 0 done, 2 usage error, 1 failure, 130 interrupted."""
    try:
        with _warnings_on_stderr():
            status = app(prog_name="ift-tune", standalone_mode=False)
    except (UsageError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        sys.exit(_complain(text, 2))
    except EnvironmentFaultError as error:
        sys.exit(_complain(str(error), 1))
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        sys.exit(_complain(str(error) or "interrupted", INTERRUPTED_STATUS))
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
