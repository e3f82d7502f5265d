"""``ift-tune refit``: the final model of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ift_tune.base.errors import EnvironmentFaultError, Interrupted, UsageError
from ift_tune.cli import values as known
from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Job,
    Quiet,
    TaskOptions,
    find_job,
    of_home,
)

OfRun = Annotated[
    Path, typer.Argument(metavar="DIR", help="a run's or a search's --out", callback=of_home)
]
NotedTask = Annotated[
    str | None,
    typer.Argument(
        metavar="[TASK]",
        help="what it is of; default: as the run has noted it",
        autocompletion=known.task_names,
    ),
]


def refit(
    directory: OfRun,
    task: NotedTask = None,
    data: Annotated[
        str,
        typer.Option(help="train, or train+val", autocompletion=known.words(*known.REFIT_DATA)),
    ] = "train",
    val_weight: Annotated[
        float,
        typer.Option(help="of a validation example with train+val, that of a training example 1"),
    ] = 1.0,
    penalty_weight: Annotated[
        float,
        typer.Option(help="of decays with train+val: as a multiple of their strength as learned"),
    ] = 1.0,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train the final model of a run: λ frozen as found, on the training data, or with val too."""
    from ift_tune.base.objectives import Objectives
    from ift_tune.cli.progress import progress_unless
    from ift_tune.joint.budget import Budget
    from ift_tune.joint.callbacks import RunFacts, during
    from ift_tune.trial.record import MODEL, TrialRecord
    from ift_tune.trial.refit import DATA, refit, refit_folder
    from ift_tune.trial.training import EVALUATIONS

    if data not in DATA:
        raise UsageError(f"--data must be train or train+val, got {data!r}")
    job = find_job_of(directory, task, data_root, download, embedded, options)
    progress = progress_unless(quiet or as_json)
    length = Budget(outer_steps=EVALUATIONS)
    facts = RunFacts(directory, job.name, length, Objectives.of(None, None), total=1)
    try:
        with during([progress], facts):
            refit(
                directory,
                job.factory,
                data,
                val_weight=val_weight,
                penalty_weight=penalty_weight,
                device=device,
                callbacks=[progress],
            )
    except EnvironmentFaultError:
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted("interrupted; go on with the same command") from error
    folder = refit_folder(data, val_weight=val_weight, penalty_weight=penalty_weight)
    record = TrialRecord(directory / folder)
    measured = {
        k: v for k, v in record.facts().items() if k.startswith(("search_", "test_", "best_"))
    }
    if as_json:
        typer.echo(json.dumps({"data": data, "model": str(record.path / MODEL), **measured}))
    elif not quiet:
        scores = "  ".join(
            f"{k} {v:.4g}" for k, v in measured.items() if k.startswith("test_") and v is not None
        )
        typer.echo(f"trained on {data} with λ frozen: {scores}")
        typer.echo(f"model and λ: {record.path / MODEL} (ift_tune.load_best reads the folder)")


def find_job_of(
    directory: Path,
    task: str | None,
    data_root: Path | None,
    download: bool,
    embedded: bool,
    options: list[str] | None,
    command: str = "refit",
) -> Job:
    """Return the job that a finished run was made of.

    Args:
        directory: Of the run.
        task: What it is of; None: as the run has noted it.
        data_root: Where data sets lie.
        download: Whether they may be fetched.
        embedded: Whether embedded data stands in.
        options: Of a built-in task.
        command: The function of the package that takes a factory.

    Raises:
        UsageError: If there is no run, or it is of another task.
    """
    from ift_tune.studies.noted import noted_task
    from ift_tune.trial.tables import RunDirectory

    run = RunDirectory(directory, resume=True)
    settings = run.settings()
    if not settings and task is None:
        raise UsageError(
            f"{directory} holds no run.json that says what it is of: name the --out of a run or of "
            "a search, or the TASK after it, as of a Tuner of your own"
        )
    if task is None:
        noted = noted_task(run)
        if noted is None:
            factory = settings.get("factory") or "a factory that it did not note"
            raise UsageError(
                f"the run was made by {factory}, which cannot be named on a command line: call "
                f"ift_tune.{command}(run_dir, factory), or name a TASK or MODULE:FACTORY"
            )
        task, noted_embedded, noted_options = noted
        embedded, options = embedded or noted_embedded, options or noted_options
    job = find_job(task, None, data_root, download, embedded, options)
    if settings and ":" not in task and job.name != settings["task"]:
        raise UsageError(
            f"the run in {directory} is of {settings['task']}: give the TASK, --embedded and "
            f"--option that it was made with, got {job.name}"
        )
    return job
