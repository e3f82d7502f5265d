"""``ift-tune run``."""

import json
from pathlib import Path

import typer

from ift_tune.base.errors import IFTTuneError
from ift_tune.base.status import StopReason
from ift_tune.cli.jobs import find_job
from ift_tune.cli.options import (
    AsJson,
    BudgetGE,
    DataRoot,
    Device,
    Download,
    Embedded,
    Metric,
    Out,
    OuterSteps,
    Quiet,
    Resume,
    Seconds,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
)
from ift_tune.cli.printing import figures, print_files, print_outcome
from ift_tune.cli.sessions import listening, resumable


def run(
    task: TaskName,
    settings: Settings = None,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    seed: Seed = 0,
    metric: Metric = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run one inner optimisation with fixed meta-hyperparameters: tables and curves."""
    from ift_tune.trial.single import run_single

    job = find_job(task, settings, data_root, download, embedded, options).limited_to(
        outer_steps, budget, seconds
    )
    out = out or Path("runs", f"{job.name}-seed{seed}")
    with listening(quiet or as_json, job.budget) as listener, resumable(out):
        outcome = run_single(
            job.factory,
            job.budget,
            out=out,
            task=job.name,
            config=job.config,
            seed=seed,
            device=device,
            metric=metric,
            resume=resume,
            callbacks=[listener],
        )
    if as_json:
        typer.echo(json.dumps({"stop_reason": outcome.stop_reason.value, **outcome.metrics}))
    elif not quiet:
        print_outcome(job, out, outcome.metrics)
        print_files(out, figures(out, job.name))
    if outcome.stop_reason is not StopReason.DONE:
        raise IFTTuneError(f"the run ended {outcome.stop_reason.value}; see solve_status in {out}")
