"""``ift-tune tasks``, ``ift-tune check`` and ``ift-tune run``: one problem by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_tune.base.errors import IFTTuneError, UsageError, require_integer
from ift_tune.base.status import StopReason
from ift_tune.cli.options import (
    AsJson,
    BudgetGE,
    DataRoot,
    Device,
    Download,
    Embedded,
    Exact,
    Job,
    Metric,
    Mode,
    NoBaseline,
    Out,
    OuterSteps,
    Patience,
    ProcessesPerTrial,
    Quiet,
    Resume,
    Seconds,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
    Thorough,
    find_job,
)
from ift_tune.cli.report import draw_figures, print_baseline, print_diagnoses, print_files

if TYPE_CHECKING:
    from ift_tune.tasks import Target, Task


def list_tasks(as_json: AsJson = False) -> None:
    """Show what is built in, with data, sizes and targets."""
    from ift_tune import tasks

    if as_json:
        typer.echo(json.dumps([_task_facts(task) for task in tasks.TASKS.values()], indent=1))
        return
    for task in tasks.TASKS.values():
        typer.echo(task.describe())


def _task_facts(task: Task) -> dict[str, Any]:
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


def check(
    task: TaskName,
    settings: Settings = None,
    thorough: Thorough = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="say what a whole study takes: time, memory, room")
    ] = False,
    n_trials: Annotated[int, typer.Option(help="of the study to plan")] = 1,
    workers: Annotated[int, typer.Option(help="processes of the study to plan")] = 1,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "cpu",
    seed: Seed = 0,
    exact: Exact = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a problem, what would make it better, and how dear it is."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.problem.factory import build_problem
    from ift_tune.testing.checkup import Study, examine
    from ift_tune.testing.symptoms import Finding

    of_the_plan = {"--outer-steps": outer_steps, "--budget": budget, "--seconds": seconds}
    given = [name for name, value in of_the_plan.items() if value is not None]
    given += ["--n-trials"] * (n_trials != 1) + ["--workers"] * (workers != 1)
    if given and not plan:
        raise UsageError(f"a study is planned by --plan: add it, or leave out {given[0]}")
    require_integer("--n-trials", n_trials, 1)
    require_integer("--workers", workers, 1)
    job = find_job(task, settings, data_root, download, embedded, options).limited_to(
        outer_steps, budget, seconds
    )
    where = resolve_device(device)
    findings: list[Finding] = []
    try:
        found = examine(
            lambda: build_problem(job.factory, job.config, where, seed),
            job.config,
            exact=exact,
            thorough=thorough,
            plan=Study(job.budget, n_trials, workers) if plan else None,
            seed=seed,
            say=_keep_quiet if as_json else typer.echo,
            found=findings.append,
        )
    except IFTTuneError:
        if as_json and findings:  # what was found up to there, the reason last
            known = [finding.as_dict() for finding in findings]
            typer.echo(json.dumps({"passed": False, "findings": known}, indent=1))
        raise
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))


def _keep_quiet(line: str) -> None:
    """Say nothing: what is asked for as JSON is said at the end."""


def run(
    task: TaskName,
    settings: Settings = None,
    outer_steps: OuterSteps = None,
    budget: BudgetGE = None,
    seconds: Seconds = None,
    patience: Patience = None,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    processes_per_trial: ProcessesPerTrial = None,
    device: Device = "auto",
    seed: Seed = 0,
    metric: Metric = None,
    mode: Mode = None,
    no_baseline: NoBaseline = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run one inner optimisation with fixed meta-hyperparameters: tables and curves."""
    from ift_tune.cli.progress import progress_unless, resumable
    from ift_tune.trial.session import run_single

    job = find_job(task, settings, data_root, download, embedded, options).limited_to(
        outer_steps, budget, seconds, patience
    )
    out = out or Path("runs", f"{job.name}-seed{seed}")
    with resumable(out):
        outcome = run_single(
            job.factory,
            job.budget,
            out=out,
            task=job.name,
            config=job.config,
            seed=seed,
            device=device,
            metric=metric,
            mode=mode,
            resume=resume,
            baseline=not no_baseline,
            callbacks=[progress_unless(quiet or as_json)],
            processes_per_trial=1 if processes_per_trial is None else processes_per_trial,
        )
    if as_json:
        typer.echo(json.dumps({"stop_reason": outcome.stop_reason.value, **outcome.metrics}))
    elif not quiet:
        _print_outcome(job, out, outcome.metrics)
        print_baseline(outcome.metrics, outcome.metric, outcome.mode)
        print_diagnoses(out, trial=0)
        print_files(out, draw_figures(out, job.name))
    if outcome.stop_reason is not StopReason.DONE:
        raise IFTTuneError(
            f"the run ended {outcome.stop_reason.value}, without a finite value to go by: see "
            f"solve_status in {out}"
        )


def _print_outcome(job: Job, out: Path, metrics: dict[str, Any]) -> None:
    """Say what one run measured and learned, and whether it reached its target."""
    from ift_tune.cli.progress import describe_metrics

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


def _target_line(target: Target, out: Path, metrics: Mapping[str, Any]) -> str:
    """Say whether, and when first, the task's target was reached."""
    from ift_tune.trial.tables import load_results

    goal = f"target {target.metric} <= {target.value:g}"
    steps = load_results(out).steps
    if target.metric in steps and not target.metric.startswith("retrained"):
        hits = steps.loc[steps[target.metric] <= target.value, "step"]
        if len(hits):
            return f"{goal}: first reached at outer step {hits.iloc[0]}"
    elif metrics.get(target.metric, float("inf")) <= target.value:
        return f"{goal}: reached"
    return f"{goal}: not reached"
