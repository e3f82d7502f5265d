"""``ift-tune compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ift_tune.base.errors import IFTTuneError, MissingDependencyError, UsageError, require
from ift_tune.cli import values as known
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
    Mode,
    Out,
    Pack,
    Quiet,
    Resume,
    Settings,
    TaskName,
    TaskOptions,
    Trust,
    Workers,
    find_job,
)
from ift_tune.cli.report import print_files
from ift_tune.cli.search import processes, ray_backend, refuse_options_of_others, require_backend
from ift_tune.compare.arms import ARMS, DEFAULT_ARMS  # plain values: no library is imported

if TYPE_CHECKING:
    from ift_tune.report import Report
    from ift_tune.search.backends import Backend

TRAININGS = 20  # plain trainings that the default budget pays for


def compare(
    task: TaskName,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"with commas between: {', '.join(ARMS)} (default: those of "
            f"{','.join(DEFAULT_ARMS)} that the task is one for)",
            autocompletion=known.arm_names,
        ),
    ] = None,
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
    backend: Annotated[
        str,
        typer.Option(
            help="what runs the searches: optuna or ray",
            autocompletion=known.words(*known.BACKENDS),
        ),
    ] = "optuna",
    gpus_per_trial: GpusPerTrial = None,
    workers: Workers = None,
    pack: Pack = None,
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
    mode: Mode = None,
    resume: Resume = False,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare IFT with black-box searches at equal budget: tables and a report."""
    require("ift_tune.compare.run", extra="compare", what="a comparison")
    refuse_options_of_others(
        backend,
        optuna={"--workers": workers, "--pack": pack},
        ray={"--address": address, "--cpus-per-trial": cpus_per_trial},
    )
    require_backend(backend, address)
    from ift_tune.cli.progress import progress_unless, resumable
    from ift_tune.compare.comparison import Comparison
    from ift_tune.compare.run import run_comparison
    from ift_tune.joint.budget import Budget
    from ift_tune.search.analysis import without_result

    if budget is not None and seconds is not None:
        raise UsageError("give --budget or --seconds, not both")
    job = find_job(task, settings, data_root, download, embedded, options)
    steps = job.inner_steps if training_steps is None else training_steps
    job = job.limited_to(outer_steps)
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
        mode=mode,
    )
    chosen: Backend = (
        ray_backend(address, cpus_per_trial, gpus_per_trial)
        if backend == "ray"
        else processes(workers, gpus_per_trial, pack=pack)
    )
    out = out or Path("runs", f"{job.name}-compare")
    with resumable(out):
        trials, _ = run_comparison(
            comparison,
            out=out,
            arms=None if arms is None else [a.strip() for a in arms.split(",") if a.strip()],
            seeds=seeds,
            first_seed=first_seed,
            backend=chosen,
            resume=resume,
            trust=trust,
            callbacks=[progress_unless(quiet or as_json)],
        )
    if "best_value" not in trials or not trials["best_value"].notna().any():
        raise IFTTuneError(f"{without_result(trials)}; there is nothing to report on in {out}")
    made = _write_page(out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **(made.facts() if made else {})}))
    elif not quiet:
        print_files(out)
        if made:
            typer.echo("\n".join([made.headline, *made.notes, f"report: {made.page}"]))


def _write_page(out: Path) -> Report | None:
    """Write the report of a comparison where Matplotlib and Jinja2 are installed."""
    from ift_tune.report import make_report

    try:
        return make_report(out)
    except MissingDependencyError as error:
        typer.echo(f"no report: {error}", err=True)
        return None
