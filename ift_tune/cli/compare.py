"""``ift-tune compare``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ift_tune.cli.jobs import find_job
from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Metric,
    Out,
    Quiet,
    Resume,
    Settings,
    TaskName,
)
from ift_tune.cli.searches import require
from ift_tune.cli.sessions import resumable
from ift_tune.config import Budget
from ift_tune.errors import UsageError

TRAININGS = 20  # plain trainings that the default budget pays for


def compare(
    task: TaskName,
    arms: Annotated[
        str, typer.Option(help="ift, ift+tpe, random, tpe, gp, cmaes, grid, asha, none")
    ] = "ift,random,tpe,none",
    budget: Annotated[
        float | None,
        typer.Option(
            help="of each search, all its trials together, in gradient-equivalents; default: "
            f"{TRAININGS} plain trainings"
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="the budget in seconds instead")] = None,
    seeds: Annotated[int, typer.Option(help="how many; --resume may add some")] = 10,
    first_seed: Annotated[int, typer.Option(help="the first of them")] = 0,
    training_steps: Annotated[
        int | None,
        typer.Option(help="inner steps of a plain training; default: those of a run of the task"),
    ] = None,
    outer_steps: Annotated[
        int | None, typer.Option(help="length of each IFT trial of ift+tpe in outer steps")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes side by side")] = 1,
    gpus_per_trial: Annotated[
        float | None, typer.Option(help="1, a part of 1 to share a GPU, or 0")
    ] = None,
    settings: Settings = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
    metric: Metric = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare IFT with black-box searches at equal budget: tables and a report."""
    require("compare")
    from ift_tune.compare.comparison import Comparison
    from ift_tune.compare.run import run_comparison

    if budget is not None and seconds is not None:
        raise UsageError("give --budget or --seconds, not both")
    job = find_job(task, settings, data_root, download).limited_to(outer_steps, None, None)
    steps = training_steps or job.config.inner_steps * (job.budget.outer_steps or 50)
    if budget is None and seconds is None:
        budget = float(TRAININGS * steps)
    comparison = Comparison(
        job.factory,
        Budget(gradient_equivalents=budget, seconds=seconds),
        task=job.name,
        config=job.config,
        trial_budget=job.budget,
        training_steps=steps,
        device=device,
        metric=metric,
    )
    out = out or Path("runs", f"{job.name}-compare")
    with resumable(out):
        run_comparison(
            comparison,
            out=out,
            arms=[name.strip() for name in arms.split(",") if name.strip()],
            seeds=seeds,
            first_seed=first_seed,
            workers=workers,
            gpus_per_trial=gpus_per_trial,
            resume=resume,
            told=None
            if quiet or as_json
            else lambda cell, n, of: typer.echo(f"{cell.name} is done ({n} of {of})", err=True),
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out)}))
