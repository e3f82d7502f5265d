"""The command line: ``ift-tune tasks | run | search | check``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ift_tune import tasks
from ift_tune.config import Budget
from ift_tune.errors import IFTTuneError, MissingDependencyError, UsageError
from ift_tune.jobs import Job, find_job, pairs
from ift_tune.progress import ConsoleListener, describe_metrics
from ift_tune.search import Interrupted, Listener, MetaSpace
from ift_tune.tables import load_results
from ift_tune.types import StopReason

INTERRUPTED_STATUS = 130

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
        typer.echo(json.dumps([_task_facts(t) for t in tasks.TASKS.values()], indent=1))
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
        _print_outcome(job, out, outcome.metrics)
        _print_files(out, _curves(out, job.name))
    if outcome.stop_reason is not StopReason.DONE:
        raise IFTTuneError(f"the run ended {outcome.stop_reason.value}; see solve_status in {out}")


@app.command()
def search(
    task: TaskName,
    backend: Annotated[str, typer.Option(help="what searches: optuna")] = "optuna",
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
    pruner: Annotated[str, typer.Option(help="none, median or hyperband")] = "none",
    storage: Annotated[
        str | None, typer.Option(help="sqlite:///F.db, journal://F, ...; default: in --out")
    ] = None,
    study_name: Annotated[str | None, typer.Option(help="default: from the settings")] = None,
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
    if backend != "optuna":
        raise UsageError(f"unknown backend {backend!r}; use --backend optuna")
    try:
        from ift_tune.search import sampling
        from ift_tune.search import study as adapter
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "search needs Optuna: pip install 'ift_tune[optuna]'"
        ) from error

    adapter.quiet_optuna()
    job = find_job(task, settings, data_root, download).limited_to(outer_steps, budget, seconds)
    space = MetaSpace.parse(pairs("--vary", vary)) if vary else MetaSpace.default()
    out = out or Path("runs", f"{job.name}-search-seed{seed}")
    varied = tuple(space.distributions)
    with _listener(quiet or as_json, job.budget, varied) as listener, _resumable(out):
        result = adapter.run_study(
            job.factory,
            space,
            job.budget,
            n_trials=n_trials,
            out=out,
            task=job.name,
            arm=f"ift+{sampler}",
            config=job.config,
            seed=seed,
            device=device,
            metric=metric,
            sampler=sampling.sampler_factory(sampler),
            pruner=sampling.make_pruner(pruner),
            storage=storage,
            study_name=study_name,
            resume=resume,
            listener=listener,
        )
    best = adapter.best_point(result.study)
    if as_json:
        typer.echo(json.dumps({"best": best, "trials": len(result.trials), "out": str(out)}))
    elif not quiet:
        _print_best(best)
        _print_files(out, [])


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


def _curves(out: Path, title: str) -> list[Path]:
    """Draw the curves where Matplotlib is installed."""
    from ift_tune.report import draw_curves

    path = out / "curves.png"
    try:
        draw_curves(load_results(out).steps, path, title=title)
    except (MissingDependencyError, UsageError) as error:
        _errors.print(f"no curves: {error}", soft_wrap=True, markup=False)
        return []
    return [path]


def _print_outcome(job: Job, out: Path, metrics: dict[str, Any]) -> None:
    typer.echo(f"{job.name}: {describe_metrics(metrics)}")
    if "retrained_test_error" in metrics:
        typer.echo(
            f"retrained from scratch with the hyperparameters frozen: "
            f"test_error {metrics['retrained_test_error']:.4g}"
        )
    learned = {k.removeprefix("learned_"): v for k, v in metrics.items() if k[:8] == "learned_"}
    if learned:
        typer.echo("learned: " + "  ".join(f"{k} {v:.4g}" for k, v in learned.items()))
    if job.target is not None:
        typer.echo(_target_line(job.target, out, metrics))


def _target_line(target: tasks.Target, out: Path, metrics: Mapping[str, Any]) -> str:
    """Say whether, and when first, the task's target was reached."""
    goal = f"target {target.metric} <= {target.value:g}"
    steps = load_results(out).steps
    if target.metric in steps and not target.metric.startswith("retrained"):
        hits = steps.loc[steps[target.metric] <= target.value, "step"]
        if len(hits):
            return f"{goal}: first reached at outer step {hits.iloc[0]}"
    elif metrics.get(target.metric, float("inf")) <= target.value:
        return f"{goal}: reached"
    return f"{goal}: not reached"


def _print_best(best: Mapping[str, Any] | None) -> None:
    if best is None:
        typer.echo("no trial was completed: every one diverged or was pruned; see stop_reason")
        return
    point = "  ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in best["params"].items()
    )
    measured = "  ".join(
        f"{k} {best[k]:.4g}" for k in ("test_error", "retrained_test_error") if k in best
    )
    typer.echo(f"best: trial {best['trial']}, {best['metric']} {best['value']:.4g}  {measured}")
    typer.echo(f"best meta-hyperparameters: {point}")


def _print_files(out: Path, more: list[Path]) -> None:
    files = [out / "trials.parquet", out / "steps.parquet", *more]
    typer.echo(f"tables: {'  '.join(str(file) for file in files)} (and .csv)")


def _task_facts(task: tasks.Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "summary": task.summary,
        "data": task.data,
        **asdict(task.sizes),
        "target": asdict(task.target),
        "default_config": task.default_config.to_flat(),
    }


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
