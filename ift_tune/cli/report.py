"""``ift-tune report``, and how the other commands name and draw what they have written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_tune.base.direction import Direction
from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.cli.options import AsJson, Quiet, of_home

if TYPE_CHECKING:
    from ift_tune.trial.tables import Results


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="where the tables are", callback=of_home)
    ],
    artifacts: Annotated[
        bool,
        typer.Option(
            "--artifacts", help="upload a search's figures to its study, for optuna-dashboard"
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the page of a comparison, or the figures of a run, from the tables; nothing is run."""
    from ift_tune.report import make_report, upload_artifacts
    from ift_tune.report.certificate import load_certificate, sentence_of
    from ift_tune.trial.tables import load_results

    results = load_results(directory)
    trials = results.trials
    compared = trials.attrs.get("run", {}).get("backend") == "compare"
    if artifacts and compared:
        raise UsageError(
            "a comparison has a study for each of its searches: name the folder of one of them, in "
            f"cells, or leave --artifacts out, got {directory}"
        )
    if not compared and len(trials):
        drawn = [
            str(path) for path in draw_figures(directory, str(trials["task"].iloc[0]), results)
        ]
        certified = load_certificate(directory)
        drawn += [str(path) for path in draw_certificate_beside(directory)]
        audited = write_page_beside(directory)
        said = None if certified is None else sentence_of(certified)
        uploaded = upload_artifacts(directory) if artifacts else []
        if as_json:
            facts = {"figures": drawn} | ({"certificate": said} if said else {})
            typer.echo(json.dumps(facts | ({"audit": audited[0]} if audited else {})))
        elif not quiet:
            typer.echo("\n".join([*drawn, *([said] if said else []), *audited]))
            if artifacts:
                typer.echo(f"uploaded to the study: {len(uploaded)} files, the others are there")
        return
    made = make_report(directory, results)
    if as_json:
        typer.echo(json.dumps(made.facts()))
    elif not quiet:
        for line in (made.headline, *made.notes, made.page, made.summary, made.figures):
            typer.echo(str(line))


def draw_figures(out: Path, title: str, results: Results | None = None) -> list[Path]:
    """Draw the curves, and pictures of what was learned, where Matplotlib is installed.

    Args:
        out: The run directory.
        title: Of the curves.
        results: Its tables, where they have been loaded already.
    """
    from ift_tune.report import draw_curves, draw_pictures
    from ift_tune.trial.tables import load_results

    path = out / "curves.png"
    try:
        results = results or load_results(out)
        run = results.trials.attrs.get("run", {})
        kind = None if run.get("metric") is None else run["metric"].removeprefix("search_")
        mode = Direction.of_run(run).value
        draw_curves(results.steps, path, kind=kind, title=title, mode=mode)
        return [path, *draw_front_of(out, title, results), *draw_pictures(out)]
    except (MissingDependencyError, UsageError) as error:
        typer.echo(f"no figures: {error}", err=True)
        return []


def draw_front_of(out: Path, title: str, results: Results | None = None) -> list[Path]:
    """Draw the trials of a search of several metrics, where Matplotlib is installed.

    Args:
        out: The run directory.
        title: Of the figure.
        results: Its tables, where they have been loaded already.
    """
    from ift_tune.base.objectives import PARETO
    from ift_tune.report import draw_front
    from ift_tune.trial.tables import load_results

    trials = (results or load_results(out)).trials
    if PARETO not in trials:
        return []
    path = out / "front.png"
    try:
        draw_front(trials, path, title=title)
    except (MissingDependencyError, UsageError) as error:
        typer.echo(f"no figure of the front: {error}", err=True)
        return []
    return [path]


def draw_certificate_beside(directory: Path) -> list[Path]:
    """Draw a run's certificate beside its table, if there is one and Matplotlib is installed."""
    from ift_tune.report.certificate import draw_certificate, load_certificate

    table = load_certificate(directory)
    if table is None:
        return []
    path = directory / "certificate.png"
    try:
        draw_certificate(table, path)
    except (MissingDependencyError, UsageError) as error:
        typer.echo(f"no figure: {error}", err=True)
        return []
    return [path]


def write_page_beside(directory: Path) -> list[str]:
    """Make the page of a run's audit anew, if there is one and Jinja2 is installed."""
    from ift_tune.report.audit import load_audit, write_page

    if load_audit(directory) is None:
        return []
    try:
        return [str(write_page(directory))]
    except MissingDependencyError as error:
        typer.echo(f"no page of the audit: {error}", err=True)
        return []


def print_diagnoses(out: Path, trial: int) -> None:
    """Say what a trial's own rows say against its result."""
    from ift_tune.trial.diagnoses import DIAGNOSES, split
    from ift_tune.trial.tables import load_results

    trials = load_results(out).trials
    # Of a study that several runs share, the best trial may be another one's.
    for entry in trials[trials["trial"] == trial].get(DIAGNOSES, ()):
        for sentence in split(entry):
            typer.echo(f"beware: {sentence}")


def print_baseline(measured: Mapping[str, Any], metric: str, mode: str) -> None:
    """Say what the plain training beside a run scored, and whether the λ found does better.

    Args:
        measured: Of the trial.
        metric: What decided.
        mode: Its direction.
    """
    kind = metric.removeprefix("search_")
    plain = measured.get(f"baseline_test_{kind}")
    retrained = measured.get(f"retrained_test_{kind}")
    found = measured.get(f"test_{kind}") if retrained is None else retrained
    if plain is None or found is None:
        return
    better = Direction(mode).better(found, plain)
    typer.echo(
        f"beside it: plain training, λ as the factory has it: test_{kind} {plain:.4g}; with the λ "
        f"found{'' if retrained is None else ', retrained'}: {found:.4g}, "
        f"{'better' if better else 'no better'} (of one seed; ift-tune compare takes several)"
    )


def print_files(out: Path, more: Sequence[Path] = ()) -> None:
    """Name the files a run has written."""
    typer.echo(f"tables: {out / 'trials.parquet'}  {out / 'steps.parquet'} (and .csv)")
    if more:
        typer.echo(f"figures: {'  '.join(map(str, more))}")
