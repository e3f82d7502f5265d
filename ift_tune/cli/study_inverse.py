"""``ift-tune study-inverse``."""

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


def study_inverse(
    task: TaskName,
    settings: Settings = None,
    terms: Annotated[
        str, typer.Option(help="numbers of steps to try, with commas between")
    ] = "0,1,2,3,5,10,20,35,50",
    cosine: Annotated[float, typer.Option(help="what the cheapest method is to reach")] = 0.9,
    damping: Annotated[float, typer.Option(help="added to the reference's diagonal")] = 0.0,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "cpu",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare the approximations of the inverse Hessian with the exact one: quality and cost."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.report.studies import draw_inverses
    from ift_tune.studies.inverse import Training, study_inverses
    from ift_tune.studies.writing import open_directory

    job = find_job(task, settings, data_root, download, embedded, options)
    steps, where = numbers("--terms", terms), resolve_device(device)
    problem = job.factory(job.config, where, seed)
    out = out or Path("runs", f"{job.name}-study-inverse")
    directory = open_directory(
        out,
        {
            "task": job.name,
            "study": "inverse",
            "config": job.config.to_flat(),
            "terms": steps,
            "cosine": cosine,
            "damping": damping,
            "seed": seed,
            "device": str(where),
        },
    )
    with directory.held():
        study = study_inverses(
            problem,
            Training(job.config, job.config.inner_steps * (job.budget.outer_steps or 50)),
            task=job.name,
            steps=steps,
            cosine=cosine,
            damping=damping,
            seed=seed,
            on_progress=teller(quiet or as_json),
        )
        finish(study, out, draw_inverses, quiet=quiet, as_json=as_json)
