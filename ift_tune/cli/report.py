"""``ift-tune report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ift_tune.cli.options import AsJson, Quiet


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where the tables are")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the page of a comparison again from its tables; nothing is run."""
    from ift_tune.report import make_report

    made = make_report(directory)
    if as_json:
        typer.echo(json.dumps(made.facts()))
    elif not quiet:
        typer.echo(made.headline)
        for path in (made.page, made.summary, made.figures):
            typer.echo(str(path))
