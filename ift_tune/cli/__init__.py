"""The command line: ``ift-tune tasks | run | search | compare | report | check``."""

from __future__ import annotations

import sys

import typer

from ift_tune.base.errors import IFTTuneError, UsageError
from ift_tune.cli import check, compare, report, run, search, studies, tasks
from ift_tune.trial.runner import Interrupted

INTERRUPTED_STATUS = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Gradient-based hyperparameter optimisation in each trial, black-box search outside.",
)
app.command("tasks")(tasks.list_tasks)
app.command()(run.run)
app.command()(search.search)
app.command()(compare.compare)
app.command()(report.report)
app.command()(check.check)
studies.register(app)


def main() -> None:
    """Run the command line; exit status 0 done, 2 usage error, 1 failure, 130 interrupted."""
    try:
        status = app(standalone_mode=False)
    except (UsageError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        sys.exit(_complain(text, 2))
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        sys.exit(_complain(str(error) or "interrupted", INTERRUPTED_STATUS))
    except IFTTuneError as error:
        sys.exit(_complain(str(error), 1))
    sys.exit(status if isinstance(status, int) else 0)


def _complain(text: str, status: int) -> int:
    if text:  # empty when there were no arguments and the help was shown
        typer.echo(f"ift-tune: {text}", err=True)
    return status
