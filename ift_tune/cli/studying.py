"""What the commands of studies share: the directory, the end, lists of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import typer

from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.studies.writing import Study, write_study

Draw: TypeAlias = Callable[[Mapping[str, pd.DataFrame], Path, str], list[Path]]
"""``draw(tables, directory, title)``: the files of the figure."""


def numbers(option: str, text: str) -> list[int]:
    """Return ``"1,2,5"`` as a list; empty for an empty text.

    Raises:
        UsageError: If it is not such a list.
    """
    return [int(value) for value in decimals(option, text, whole=True)]


def decimals(option: str, text: str, *, whole: bool = False) -> list[float]:
    """Return ``"0.1,0.5"`` as a list; see `numbers`."""
    try:
        return [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"{option} takes {kind} with commas between, got {text!r}") from error


def teller(quiet: bool) -> Callable[[str], None]:
    """Return what says on standard error how a study goes."""
    return (lambda _: None) if quiet else (lambda line: typer.echo(line, err=True))


def finish(study: Study, out: Path, draw: Draw, *, quiet: bool, as_json: bool) -> None:
    """Draw, write and print what a study found."""
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
