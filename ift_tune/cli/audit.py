"""``ift-tune audit``: which training examples are suspect."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Quiet,
    TaskOptions,
    of_home,
)
from ift_tune.cli.refit import NotedTask, OfRun, find_job_of


def audit(
    directory: OfRun,
    task: NotedTask = None,
    seeds: Annotated[
        int, typer.Option(help="the run's own and how many more, for standard errors")
    ] = 1,
    top: Annotated[int, typer.Option(help="examples that the page shows")] = 50,
    folds: Annotated[
        int, typer.Option(help="plain trainings for cleanlab, each without a part; 0: none")
    ] = 5,
    products: Annotated[
        int, typer.Option(help="of the solve for what leaving out an example changes; 0: none")
    ] = 100,
    out: Annotated[
        Path | None, typer.Option(help="where to write; default DIR/audit", callback=of_home)
    ] = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rank a run's training examples by how suspect their labels are: tables and a page.

    The run has learned a weight for each (ExampleWeights).
    """
    from ift_tune.report.audit import audit
    from ift_tune.studies.audit_findings import AUDIT

    job = find_job_of(directory, task, data_root, download, embedded, options, command="audit")
    table = audit(
        directory,
        job.factory,
        seeds=seeds,
        top=top,
        folds=folds,
        products=products,
        out=out,
        device=device,
        say=(lambda line: None) if quiet or as_json else typer.echo,
    )
    folder = out or directory / AUDIT
    facts = table.attrs[AUDIT]
    files = {"page": f"{folder / AUDIT}.html", "table": f"{folder / AUDIT}.parquet"}
    if as_json:
        known = {k: _finite(v) for k, v in facts.items() if k != "looks"}
        typer.echo(json.dumps(known | files, indent=1))
    elif not quiet:
        for sentence in facts["sentences"]:
            typer.echo(sentence)
        shown = table.drop(columns=["search_loss_change_se"]).head(10)
        typer.echo(shown.to_string(index=False, float_format="{:.3g}".format))
        typer.echo(f"table: {files['table']} (and .csv)")
        typer.echo(f"page: {files['page']}")


def _finite(value: Any) -> Any:
    """Return plain values with None for what is not finite, as JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
