"""``ift-tune report``, and how the other commands name and draw what they have written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.cli.options import AsJson, Quiet


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where the tables are")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the page of a comparison, or the figures of a run, from the tables; nothing is run."""
    from ift_tune.report import make_report
    from ift_tune.trial.tables import load_results

    trials = load_results(directory).trials
    if trials.attrs.get("run", {}).get("backend") != "compare" and len(trials):
        drawn = [str(path) for path in draw_figures(directory, str(trials["task"].iloc[0]))]
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


def draw_figures(out: Path, title: str) -> list[Path]:
    """Draw the curves, and pictures of what was learned, where Matplotlib is installed."""
    from ift_tune.report import draw_curves, draw_pictures
    from ift_tune.trial.tables import load_results

    path = out / "curves.png"
    try:
        draw_curves(load_results(out).steps, path, title=title)
        return [path, *draw_pictures(out)]
    except (MissingDependencyError, UsageError) as error:
        typer.echo(f"no figures: {error}", err=True)
        return []


def print_files(out: Path, more: Sequence[Path] = ()) -> None:
    """Name the files a run has written."""
    files = [out / "trials.parquet", out / "steps.parquet", *more]
    typer.echo(f"tables: {'  '.join(str(file) for file in files)} (and .csv)")
