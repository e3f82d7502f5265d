"""What the command line says when a run is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ift_tune import tasks
from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.cli.jobs import Job
from ift_tune.cli.progress import describe_metrics
from ift_tune.trial.tables import load_results

if TYPE_CHECKING:
    from ift_tune.report import Report


def figures(out: Path, title: str) -> list[Path]:
    """Draw the curves, and pictures of what was learned, where Matplotlib is installed."""
    from ift_tune.report import draw_curves, draw_pictures

    path = out / "curves.png"
    try:
        draw_curves(load_results(out).steps, path, title=title)
        return [path, *draw_pictures(out)]
    except (MissingDependencyError, UsageError) as error:
        typer.echo(f"no figures: {error}", err=True)
        return []


def page(out: Path) -> Report | None:
    """Write the report of a comparison where Matplotlib and Jinja2 are installed."""
    from ift_tune.report import make_report

    try:
        return make_report(out)
    except MissingDependencyError as error:
        typer.echo(f"no report: {error}", err=True)
        return None


def print_outcome(job: Job, out: Path, metrics: dict[str, Any]) -> None:
    """Say what one run measured and learned, and whether it reached its target."""
    typer.echo(f"{job.name}: {describe_metrics(metrics)}")
    for kind in ("error", "loss"):
        if (value := metrics.get(f"retrained_test_{kind}")) is not None:
            typer.echo(
                f"retrained from scratch with the hyperparameters frozen: test_{kind} {value:.4g}"
            )
            break
    if words := metrics.get("learned_words"):
        typer.echo(f"learned: {words}")
    learned = {
        k.removeprefix("learned_"): v
        for k, v in metrics.items()
        if k.startswith("learned_") and isinstance(v, float)
    }
    if learned:
        typer.echo("in numbers: " + "  ".join(f"{k} {v:.4g}" for k, v in learned.items()))
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


def print_best(best: Mapping[str, Any] | None) -> None:
    """Name the best trial of a search and its meta-hyperparameters."""
    if best is None:
        typer.echo("no trial was completed: every one diverged or was pruned; see stop_reason")
        return
    point = "  ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in best["params"].items()
    )
    kind = "error" if "test_error" in best else "loss"
    shown = [k for k in (f"test_{kind}", f"retrained_test_{kind}") if k in best]
    measured = "  ".join(f"{k} {best[k]:.4g}" for k in shown)
    typer.echo(f"best: trial {best['trial']}, {best['metric']} {best['value']:.4g}  {measured}")
    typer.echo(f"best meta-hyperparameters: {point}")


def print_files(out: Path, more: list[Path]) -> None:
    """Name the files a run has written."""
    files = [out / "trials.parquet", out / "steps.parquet", *more]
    typer.echo(f"tables: {'  '.join(str(file) for file in files)} (and .csv)")


def task_facts(task: tasks.Task) -> dict[str, Any]:
    """Return what a task declares, as plain values."""
    return {
        "name": task.name,
        "summary": task.summary,
        "data": task.data,
        **asdict(task.sizes),
        "target": asdict(task.target),
        "options": task.options(),
        "default_config": dict(task.settings),
    }
