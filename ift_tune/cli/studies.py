"""``ift-tune study-inverse | study-cost | study-validation | study-worth``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from ift_tune.base.errors import MissingDependencyError, UsageError, require
from ift_tune.cli import values as known
from ift_tune.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Download,
    Embedded,
    Out,
    Quiet,
    Resume,
    Seed,
    Settings,
    TaskName,
    TaskOptions,
    Trust,
    find_job,
)

if TYPE_CHECKING:
    import pandas as pd

    from ift_tune.studies.writing import Study

Number = TypeVar("Number", int, float)
Draw: TypeAlias = "Callable[[Mapping[str, pd.DataFrame], Path, str], list[Path]]"


def study_inverse(
    task: TaskName,
    settings: Settings = None,
    terms: Annotated[
        str,
        typer.Option(metavar="NUMBER,...", help="numbers of steps to try, with commas between"),
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
        str, typer.Option(metavar="NUMBER,...", help="values of T, with commas between")
    ] = "1,2,5,10,20,50,100,200",
    terms: Annotated[
        str, typer.Option(metavar="NUMBER,...", help="values of K, with commas between")
    ] = "0,1,2,5,10,20,50",
    widths: Annotated[
        str,
        typer.Option(
            metavar="NUMBER,...", help="of the nets that P and H are varied on; '' for none"
        ),
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
        str,
        typer.Option(metavar="NUMBER,...", help="numbers of points for training and validation"),
    ] = "100,200,800",
    fractions: Annotated[
        str, typer.Option(metavar="NUMBER,...", help="of them for validation")
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


def study_worth(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="data sets; default digits,mnist",
            autocompletion=known.joined(*known.WORTH_DATA),
        ),
    ] = None,
    jobs: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="what λ is for; default cleaning,decay,imbalance",
            autocompletion=known.joined(*known.WORTH_JOBS),
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(metavar="NUMBER,...", help="fractions of redrawn labels; default 0.2,0.5,0.8"),
    ] = None,
    clean: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER,...", help="numbers of validation examples; default 50,200,1000"
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"of {', '.join(known.ARMS)}; default: those of each task",
            autocompletion=known.arm_names,
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="how many; default 5")] = None,
    middle_seeds: Annotated[
        int | None, typer.Option(help="of cells inside the map; default: twice as many")
    ] = None,
    first_seed: Annotated[int, typer.Option(help="the first of them")] = 0,
    trainings: Annotated[
        float | None, typer.Option(help="budget of a search, in plain trainings; default 10")
    ] = None,
    training_steps: Annotated[
        int | None, typer.Option(help="inner steps of a plain training; default 500")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="other defaults: digits alone, two cells a job, minutes")
    ] = False,
    workers: Annotated[int, typer.Option(help="processes side by side")] = 1,
    out: Out = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "cpu",
    resume: Resume = False,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Map where IFT is worth it: noise, clean examples and jobs; who wins, by how much."""
    require("ift_tune.compare.run", extra="compare", what="a map of worth")
    from ift_tune.cli.progress import resumable
    from ift_tune.report.studies import draw_worth
    from ift_tune.studies.worth import QUICK, study_worth

    given = {
        "data": None if data is None else names(data),
        "jobs": None if jobs is None else names(jobs),
        "noise": None if noise is None else numbers("--noise", noise),
        "clean": None if clean is None else whole_numbers("--clean", clean),
        "arms": None if arms is None else names(arms),
        "seeds": seeds,
        "middle_seeds": middle_seeds,
        "trainings": trainings,
        "training_steps": training_steps,
    }
    chosen = {**(QUICK if quick else {}), **{k: v for k, v in given.items() if v is not None}}
    out = out or Path("runs", "study-worth")
    with resumable(out):
        study = study_worth(
            out,
            **chosen,
            first_seed=first_seed,
            workers=workers,
            device=device,
            data_root=data_root,
            download=download,
            resume=resume,
            trust=trust,
            on_progress=_speaker(quiet or as_json),
        )
    _finish(study, out, draw_worth, quiet=quiet, as_json=as_json)


def _carry_out(
    measure: Callable[..., Study],
    out: Path,
    settings: Mapping[str, Any],
    draw: Draw,
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
    from ift_tune.trial.tables import RunDirectory

    directory = RunDirectory(out)
    with directory.held():  # by a lock alone: a mistake found while measuring leaves nothing behind
        study = measure(on_progress=_speaker(quiet or as_json))
        directory.begin(settings, environment())
        _finish(study, out, draw, quiet=quiet, as_json=as_json)


def _finish(study: Study, out: Path, draw: Draw, *, quiet: bool, as_json: bool) -> None:
    """Draw, write and print a study; see `_carry_out`."""
    from ift_tune.studies.writing import write_study

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


def _speaker(silent: bool) -> Callable[[str], None]:
    """Return what says how a study goes on."""
    return (lambda _: None) if silent else partial(typer.echo, err=True)


def names(text: str) -> list[str]:
    """Return ``"a,b"`` as a list; empty for an empty text."""
    return [part.strip() for part in text.split(",") if part.strip()]


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
