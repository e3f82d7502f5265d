"""``ift-tune study-cost``."""

from pathlib import Path
from typing import Annotated

import typer

from ift_tune.cli.jobs import find_job
from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Out,
    Quiet,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
)
from ift_tune.cli.studying import finish, numbers, teller


def study_cost(
    task: TaskName,
    settings: Settings = None,
    inner_steps: Annotated[
        str, typer.Option(help="values of T, with commas between")
    ] = "1,2,5,10,20,50,100,200",
    terms: Annotated[
        str, typer.Option(help="values of K, with commas between")
    ] = "0,1,2,5,10,20,50",
    widths: Annotated[
        str, typer.Option(help="of the nets that P and H are varied on; '' for none")
    ] = "8,32,128,512",
    most_unrolled: Annotated[
        int, typer.Option(help="largest T at which unrolling's memory is measured; 0: never")
    ] = 20,
    repeats: Annotated[int, typer.Option(help="timings of each, by turns")] = 5,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure time and peak memory of joint tuning against plain training."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.report.studies import draw_costs
    from ift_tune.studies.cost import study_costs
    from ift_tune.studies.writing import open_directory

    job = find_job(task, settings, data_root, download, embedded, options)
    where = resolve_device(device)
    inner = numbers("--inner-steps", inner_steps)
    products, sizes = numbers("--terms", terms), numbers("--widths", widths)
    problem = job.factory(job.config, where, seed)
    out = out or Path("runs", f"{job.name}-study-cost")
    directory = open_directory(
        out,
        {
            "task": job.name,
            "study": "cost",
            "config": job.config.to_flat(),
            "inner_steps": inner,
            "terms": products,
            "widths": sizes,
            "most_unrolled": most_unrolled,
            "repeats": repeats,
            "seed": seed,
            "device": str(where),
        },
    )
    with directory.held():
        study = study_costs(
            problem,
            job.config,
            task=job.name,
            inner_steps=inner,
            terms=products,
            widths=sizes,
            most_unrolled=most_unrolled,
            repeats=repeats,
            on_progress=teller(quiet or as_json),
        )
        finish(study, out, draw_costs, quiet=quiet, as_json=as_json)
