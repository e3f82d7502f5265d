"""``ift-tune certify``: does the hypergradient of a run predict what retraining does?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Quiet,
    TaskOptions,
)
from ift_tune.cli.refit import NotedTask, OfRun, find_job_of


def certify(
    directory: OfRun,
    task: NotedTask = None,
    directions: Annotated[int, typer.Option(help="random directions, each gone both ways")] = 8,
    groups: Annotated[int, typer.Option(help="groups of weighted examples to leave out")] = 12,
    longest: Annotated[
        int, typer.Option(help="most inner steps of a retraining, times those of the best trial")
    ] = 4,
    products: Annotated[int, typer.Option(help="of a longer solve to compare with")] = 300,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Hold the hypergradient at the λ that a run has found against retraining; a yes or a no."""
    from ift_tune.cli.report import draw_certificate_beside
    from ift_tune.studies.certificate import certify
    from ift_tune.studies.certificate_findings import CERTIFICATE
    from ift_tune.trial.tables import RunDirectory

    job = find_job_of(directory, task, data_root, download, embedded, options)
    silent = quiet or as_json
    with RunDirectory(directory, resume=True).held():
        found = certify(
            directory,
            job.factory,
            directions=directions,
            groups=groups,
            longest=longest,
            products=products,
            device=device,
            say=(lambda line: None) if silent else typer.echo,
        )
        found.save(directory)
    drawn = draw_certificate_beside(directory)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    elif not quiet:
        for line in found.lines():
            typer.echo(line)
        typer.echo(str(found.finding))
        typer.echo(f"table: {directory / CERTIFICATE}.parquet (and .csv)")
        for path in drawn:
            typer.echo(f"figure: {path}")
