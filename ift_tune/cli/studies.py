"""``ift-tune study-inverse | study-cost | study-validation``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Out,
    Quiet,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
    find_job,
)

if TYPE_CHECKING:
    import pandas as pd

    from ift_tune.studies.writing import Study

Number = TypeVar("Number", int, float)


def study_inverse(
    task: TaskName,
    settings: Settings = None,
    terms: Annotated[
        str, typer.Option(help="numbers of steps to try, with commas between")
    ] = "0,1,2,3,5,10,20,35,50",
    cosine: Annotated[float, typer.Option(help="what the cheapest method is to reach")] = 0.9,
    damping: Annotated[float, typer.Option(help="added to the reference's diagonal")] = 0.0,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "cpu",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare the approximations of the inverse Hessian with the exact one: quality and cost."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.problem.factory import build_problem
    from ift_tune.report.studies import draw_inverses
    from ift_tune.studies.inverse import Training, study_inverses

    job = find_job(task, settings, data_root, download, embedded, options)
    steps, where = whole_numbers("--terms", terms), resolve_device(device)
    problem = build_problem(job.factory, job.config, where, seed)
    varied: dict[str, Any] = {"cosine": cosine, "damping": damping, "seed": seed}
    measure = partial(
        study_inverses,
        problem,
        Training(job.config, job.inner_steps),
        task=job.name,
        steps=steps,
        **varied,
    )
    noted = {
        "task": job.name,
        "study": "inverse",
        "config": job.config.to_flat(),
        "terms": steps,
        **varied,
        "device": str(where),
    }
    out = out or Path("runs", f"{job.name}-study-inverse")
    _carry_out(measure, out, noted, draw_inverses, quiet=quiet, as_json=as_json)


def study_cost(
    task: TaskName,
    settings: Settings = None,
    inner_steps: Annotated[
        str, typer.Option(help="values of T, with commas between")
    ] = "1,2,5,10,20,50,100,200",
    terms: Annotated[
        str, typer.Option(help="values of K, with commas between")
    ] = "0,1,2,5,10,20,50",
    widths: Annotated[
        str, typer.Option(help="of the nets that P and H are varied on; '' for none")
    ] = "8,32,128,512",
    most_unrolled: Annotated[
        int, typer.Option(help="largest T at which unrolling's memory is measured; 0: never")
    ] = 20,
    repeats: Annotated[int, typer.Option(help="timings of each, by turns")] = 5,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    embedded: Embedded = False,
    options: TaskOptions = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure time and peak memory of joint tuning against plain training."""
    from ift_tune.base.environment import resolve_device
    from ift_tune.problem.factory import build_problem
    from ift_tune.report.studies import draw_costs
    from ift_tune.studies.cost import study_costs

    job = find_job(task, settings, data_root, download, embedded, options)
    where = resolve_device(device)
    inner = whole_numbers("--inner-steps", inner_steps)
    products, sizes = whole_numbers("--terms", terms), whole_numbers("--widths", widths)
    problem = build_problem(job.factory, job.config, where, seed)
    varied: dict[str, Any] = {
        "inner_steps": inner,
        "terms": products,
        "widths": sizes,
        "most_unrolled": most_unrolled,
        "repeats": repeats,
    }
    measure = partial(study_costs, problem, job.config, task=job.name, **varied)
    noted = {
        "task": job.name,
        "study": "cost",
        "config": job.config.to_flat(),
        **varied,
        "seed": seed,
        "device": str(where),
    }
    out = out or Path("runs", f"{job.name}-study-cost")
    _carry_out(measure, out, noted, draw_costs, quiet=quiet, as_json=as_json)


def study_validation(
    totals: Annotated[
        str, typer.Option(help="numbers of points for training and validation")
    ] = "100,200,800",
    fractions: Annotated[
        str, typer.Option(help="of them for validation")
    ] = "0.05,0.1,0.25,0.5,0.75,0.9",
    seeds: Annotated[int, typer.Option(help="how many")] = 6,
    outer_steps: Annotated[int, typer.Option(help="of each tuning")] = 100,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Vary the share of the validation set for one decay and for one a weight, on digits."""
    from ift_tune.report.studies import draw_fractions
    from ift_tune.studies.validation_size import CONFIG, study_validation_sizes

    points, shares = whole_numbers("--totals", totals), numbers("--fractions", fractions)
    varied: dict[str, Any] = {
        "totals": points,
        "fractions": shares,
        "seeds": seeds,
        "outer_steps": outer_steps,
    }
    measure = partial(study_validation_sizes, **varied)
    noted = {
        "task": "digits, softmax regression",
        "study": "validation",
        "config": CONFIG.to_flat(),
        **varied,
    }
    out = out or Path("runs", "study-validation")
    _carry_out(measure, out, noted, draw_fractions, quiet=quiet, as_json=as_json)


def _carry_out(
    measure: Callable[..., Study],
    out: Path,
    settings: Mapping[str, Any],
    draw: Callable[[Mapping[str, pd.DataFrame], Path, str], list[Path]],
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure into a new directory, draw, write and print.

    Args:
        measure: Makes the study; ``on_progress`` is called with lines about how it goes.
        out: The directory; refused if it holds anything.
        settings: What is noted in it, beside the machine.
        draw: ``draw(tables, directory, title)`` returns the files of the figure.
        quiet: Print nothing.
        as_json: Print the findings as JSON, and nothing else.
    """
    from ift_tune.base.environment import environment
    from ift_tune.studies.writing import write_study
    from ift_tune.trial.tables import RunDirectory

    silent = quiet or as_json
    directory = RunDirectory(out)
    with directory.held():  # by a lock alone: a mistake found while measuring leaves nothing behind
        study = measure(on_progress=(lambda _: None) if silent else partial(typer.echo, err=True))
        directory.begin(settings, environment())
        try:
            figures = draw(study.tables, out, study.title)
        except MissingDependencyError as error:
            typer.echo(f"no figure: {error}", err=True)
            figures = []
        readme, *_ = write_study(out, study, figures)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **study.facts()}))
    elif not quiet:
        for finding in study.findings:
            typer.echo(f"- {finding}")
        typer.echo(f"report: {readme}")


def whole_numbers(option: str, text: str) -> list[int]:
    """Return ``"1,2,5"`` as a list; empty for an empty text.

    Raises:
        UsageError: If it is not such a list.
    """
    return _split(option, text, int, "whole numbers")


def numbers(option: str, text: str) -> list[float]:
    """Return ``"0.1,0.5"`` as a list; see `whole_numbers`."""
    return _split(option, text, float, "numbers")


def _split(option: str, text: str, kind: Callable[[str], Number], called: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{option} takes {called} with commas between, got {text!r}") from error
