"""``ift-tune report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ift_tune.cli.options import AsJson, Quiet
from ift_tune.cli.printing import figures
from ift_tune.trial.tables import load_results


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where the tables are")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the page of a comparison, or the figures of a run, from the tables; nothing is run."""
    from ift_tune.report import make_report

    trials = load_results(directory).trials
    if trials.attrs.get("run", {}).get("backend") != "compare" and len(trials):
        drawn = [str(path) for path in figures(directory, str(trials["task"].iloc[0]))]
        if as_json:
            typer.echo(json.dumps({"figures": drawn}))
        elif not quiet:
            typer.echo("\n".join(drawn))
        return
    made = make_report(directory)
    if as_json:
        typer.echo(json.dumps(made.facts()))
    elif not quiet:
        typer.echo(made.headline)
        for path in (made.page, made.summary, made.figures):
            typer.echo(str(path))
