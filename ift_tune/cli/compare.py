"""``ift-tune compare``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ift_tune.base.errors import UsageError
from ift_tune.cli.comparing import ComparisonListener
from ift_tune.cli.jobs import find_job
from ift_tune.cli.options import (
    Address,
    AsJson,
    CpusPerTrial,
    DataRoot,
    Device,
    Download,
    Embedded,
    GpusPerTrial,
    Metric,
    Out,
    Quiet,
    Resume,
    Settings,
    TaskName,
    TaskOptions,
    Workers,
)
from ift_tune.cli.printing import page, print_files
from ift_tune.cli.searches import options_of, require
from ift_tune.cli.sessions import resumable
from ift_tune.joint.config import Budget

TRAININGS = 20  # plain trainings that the default budget pays for


def compare(
    task: TaskName,
    arms: Annotated[
        str, typer.Option(help="ift, ift+tpe, random, random+val, tpe, gp, cmaes, grid, asha, none")
    ] = "ift,random,random+val,tpe,none",
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
    backend: Annotated[str, typer.Option(help="what runs the searches: optuna or ray")] = "optuna",
    gpus_per_trial: GpusPerTrial = None,
    workers: Workers = None,
    address: Address = None,
    cpus_per_trial: CpusPerTrial = None,
    settings: Settings = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    metric: Metric = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare IFT with black-box searches at equal budget: tables and a report."""
    require("compare")
    given = options_of(
        backend,
        gpus_per_trial=gpus_per_trial,
        optuna={"workers": workers},
        ray={"address": address, "cpus_per_trial": cpus_per_trial},
    )
    require(backend)
    from ift_tune.compare.comparison import Comparison
    from ift_tune.compare.run import run_comparison

    if budget is not None and seconds is not None:
        raise UsageError("give --budget or --seconds, not both")
    job = find_job(task, settings, data_root, download, embedded, options)
    steps = training_steps
    if steps is None:
        steps = job.config.inner_steps * (job.budget.outer_steps or 50)
    job = job.limited_to(outer_steps, None, None)
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
    with (
        ComparisonListener(Console(stderr=True, quiet=quiet or as_json)) as progress,
        resumable(out),
    ):
        run_comparison(
            comparison,
            out=out,
            arms=[name.strip() for name in arms.split(",") if name.strip()],
            seeds=seeds,
            first_seed=first_seed,
            backend=backend,
            resume=resume,
            **given,
            on_done=lambda cell, count, total: progress.finished(cell.name, count, total),
            callbacks=[progress],
        )
    made = page(out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **(made.facts() if made else {})}))
    elif not quiet:
        print_files(out, [])
        if made:
            typer.echo(f"{made.headline}\nreport: {made.page}")
