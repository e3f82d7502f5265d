"""The command line: ``ift-tune tasks | run | search | check``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ift_tune import searches, tasks
from ift_tune.config import Budget
from ift_tune.errors import IFTTuneError, UsageError
from ift_tune.jobs import find_job, pairs
from ift_tune.printing import curves, print_best, print_files, print_outcome, task_facts
from ift_tune.progress import ConsoleListener
from ift_tune.search import Interrupted, Listener, MetaSpace
from ift_tune.types import StopReason

INTERRUPTED_STATUS = 130
OPTUNA, RAY = "with --backend optuna", "with --backend ray"  # panels of the help

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Gradient-based hyperparameter optimisation in each trial, black-box search outside.",
)
_errors = Console(stderr=True)

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="a built-in task or MODULE:FACTORY")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a meta-hyperparameter; may be repeated"),
]
OuterSteps = Annotated[int | None, typer.Option(help="length of a trial in outer steps")]
BudgetGE = Annotated[
    float | None, typer.Option("--budget", help="length of a trial in gradient-equivalents")
]
Seconds = Annotated[float | None, typer.Option(help="length of a trial in seconds")]
Out = Annotated[Path | None, typer.Option(help="run directory; default runs/TASK-seedN")]
DataRoot = Annotated[Path | None, typer.Option(help="where data sets lie; default $IFT_TUNE_DATA")]
Download = Annotated[bool, typer.Option("--download", help="fetch missing data into --data-root")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="of splits, weights, order of batches and sampler")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Metric = Annotated[str | None, typer.Option(help="search metric to minimise, as search_loss")]


@app.command("tasks")
def list_tasks(as_json: AsJson = False) -> None:
    """Show what is built in, with data, sizes and targets."""
    if as_json:
        typer.echo(json.dumps([task_facts(t) for t in tasks.TASKS.values()], indent=1))
        return
    for task in tasks.TASKS.values():
        typer.echo(task.describe())


@app.command()
def run(
    task: TaskName,
    settings: Settings = None,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
    seed: Seed = 0,
    metric: Metric = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run one inner optimisation with fixed meta-hyperparameters: tables and curves."""
    from ift_tune.search.single import run_single

    job = find_job(task, settings, data_root, download).limited_to(outer_steps, budget, seconds)
    out = out or Path("runs", f"{job.name}-seed{seed}")
    with _listener(quiet or as_json, job.budget) as listener, _resumable(out):
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
            listener=listener,
        )
    if as_json:
        typer.echo(json.dumps({"stop_reason": outcome.stop_reason.value, **outcome.metrics}))
    elif not quiet:
        print_outcome(job, out, outcome.metrics)
        print_files(out, curves(out, job.name))
    if outcome.stop_reason is not StopReason.DONE:
        raise IFTTuneError(f"the run ended {outcome.stop_reason.value}; see solve_status in {out}")


@app.command()
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
    gpus_per_trial: Annotated[
        float | None, typer.Option(help="1, a part of 1 to share a GPU, or 0")
    ] = None,
    pruner: Annotated[
        str | None, typer.Option(help="optuna: none, median or hyperband", rich_help_panel=OPTUNA)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="optuna: processes side by side", rich_help_panel=OPTUNA)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="ray: of a cluster; default: start one here", rich_help_panel=RAY),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ray: none, asha, hyperband or pbt", rich_help_panel=RAY)
    ] = None,
    searcher: Annotated[
        str | None,
        typer.Option(help="ray: optuna (with --sampler) or random", rich_help_panel=RAY),
    ] = None,
    cpus_per_trial: Annotated[
        float | None, typer.Option(help="ray: cores of a trial", rich_help_panel=RAY)
    ] = None,
    settings: Settings = None,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
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
    job = find_job(task, settings, data_root, download).limited_to(outer_steps, budget, seconds)
    space = MetaSpace.parse(pairs("--vary", vary)) if vary else MetaSpace.default()
    out = out or Path("runs", f"{job.name}-search-seed{seed}")
    varied = tuple(space.distributions)
    with _listener(quiet or as_json, job.budget, varied) as listener, _resumable(out):
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
            listener=listener,
        )
    if as_json:
        typer.echo(json.dumps({"best": found.best, "trials": len(found.trials), "out": str(out)}))
    elif not quiet:
        print_best(found.best)
        if found.finished < n_trials:
            typer.echo(f"{found.finished} of {n_trials} trials are finished; others run the rest")
        print_files(out, [])


@app.command()
def check(
    task: TaskName,
    settings: Settings = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Say whether a problem is differentiable, its hypergradient right, and how dear it is."""
    from ift_tune.devices import resolve_device
    from ift_tune.testing import check_hypergradient
    from ift_tune.testing.price import measure_price

    job = find_job(task, settings, data_root, download)
    where = resolve_device(device)
    typer.echo(str(measure_price(job.factory(job.config, where, seed), job.config)))
    typer.echo(str(check_hypergradient(job.factory(job.config, where, seed), seed=seed)))


@contextlib.contextmanager
def _listener(quiet: bool, budget: Budget, varied: tuple[str, ...] = ()) -> Iterator[Listener]:
    if quiet:
        yield Listener()
        return
    with ConsoleListener(_errors, budget, varied) as listener:
        yield listener


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            f"interrupted; go on with the same command and --out {out} --resume"
        ) from error


def main() -> None:
    """Run the command line; exit status 0 done, 2 usage error, 1 failure, 130 interrupted."""
    try:
        status = app(standalone_mode=False)
    except (UsageError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        sys.exit(_complain(text, 2))
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        sys.exit(_complain(str(error) or "interrupted", INTERRUPTED_STATUS))
    except IFTTuneError as error:
        sys.exit(_complain(str(error), 1))
    sys.exit(status if isinstance(status, int) else 0)


def _complain(text: str, status: int) -> int:
    if text:  # empty when there were no arguments and the help was shown
        typer.echo(f"ift-tune: {text}", err=True)
    return status
