"""``ift-tune search``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ift_tune.cli import searches
from ift_tune.cli.jobs import find_job, pairs
from ift_tune.cli.options import (
    OPTUNA,
    RAY,
    Address,
    AsJson,
    BudgetGE,
    CpusPerTrial,
    DataRoot,
    Device,
    Download,
    Embedded,
    GpusPerTrial,
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
    Workers,
)
from ift_tune.cli.printing import print_best, print_files
from ift_tune.cli.sessions import listening, resumable
from ift_tune.search.space import MetaSpace


def search(
    task: TaskName,
    backend: Annotated[str, typer.Option(help="what runs the trials: optuna or ray")] = "optuna",
    n_trials: Annotated[int, typer.Option(help="finished trials in the end")] = 20,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE",
            help="KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B; may be repeated; "
            "default: terms, alpha, meta_lr, inner_steps",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe or random")] = "tpe",
    storage: Annotated[
        str | None, typer.Option(help="sqlite:///F.db, journal://F, ...; default: in --out")
    ] = None,
    study_name: Annotated[str | None, typer.Option(help="default: from the settings")] = None,
    gpus_per_trial: GpusPerTrial = None,
    pruner: Annotated[
        str | None, typer.Option(help="optuna: none, median or hyperband", rich_help_panel=OPTUNA)
    ] = None,
    workers: Workers = None,
    address: Address = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ray: none, asha, hyperband or pbt", rich_help_panel=RAY)
    ] = None,
    searcher: Annotated[
        str | None,
        typer.Option(help="ray: optuna (with --sampler) or random", rich_help_panel=RAY),
    ] = None,
    cpus_per_trial: CpusPerTrial = None,
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
    """Search meta-hyperparameters: each trial is an inner IFT optimisation."""
    run_search = searches.choose(
        backend,
        sampler=sampler,
        gpus_per_trial=gpus_per_trial,
        optuna={"pruner": pruner, "workers": workers},
        ray={
            "address": address,
            "scheduler": scheduler,
            "searcher": searcher,
            "cpus_per_trial": cpus_per_trial,
        },
    )
    job = find_job(task, settings, data_root, download, embedded, options).limited_to(
        outer_steps, budget, seconds
    )
    space = MetaSpace.parse(pairs("--vary", vary)) if vary else MetaSpace.default()
    out = out or Path("runs", f"{job.name}-search-seed{seed}")
    varied = tuple(space.distributions)
    with listening(quiet or as_json, job.budget, varied) as listener, resumable(out):
        found = run_search(
            job.factory,
            space,
            job.budget,
            n_trials=n_trials,
            out=out,
            task=job.name,
            config=job.config,
            seed=seed,
            device=device,
            metric=metric,
            storage=storage,
            study_name=study_name,
            resume=resume,
            callbacks=[listener],
        )
    if as_json:
        typer.echo(json.dumps({"best": found.best, "trials": len(found.trials), "out": str(out)}))
    elif not quiet:
        print_best(found.best)
        if found.finished < n_trials:
            typer.echo(f"{found.finished} of {n_trials} trials are finished; others run the rest")
        print_files(out, [])
