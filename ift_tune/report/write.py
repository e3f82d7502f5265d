"""Write the report of a comparison beside its tables."""

from __future__ import annotations

import importlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ift_tune.base.errors import MissingDependencyError
from ift_tune.base.files import write_atomically
from ift_tune.trial.tables import Results, load_results

_NEEDED = {
    "matplotlib.figure": "report",
    "jinja2": "report",
    "optuna": "compare",
    "scipy": "compare",
}


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: The HTML page.
        summary: The Markdown.
        figures: The folder of the figures.
        headline: The verdict's first sentence.
    """

    page: Path
    summary: Path
    figures: Path
    headline: str

    def facts(self) -> dict[str, str]:
        """Return plain values, for programs that read what the command line prints."""
        return {"headline": self.headline, "report": str(self.page), "summary": str(self.summary)}


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Write the report of a comparison from its tables; nothing is run again.

    The directory then holds ``report.html`` (one file that needs no other), ``report.md``,
    ``figures/`` and the tables ``final``, ``chosen`` and ``against`` as CSV and parquet. The same
    tables give the same bytes.

    Args:
        directory: Where ``trials.parquet`` and ``steps.parquet`` of a comparison are, finished or
            not.

    Returns:
        The path of the page.

    Raises:
        UsageError: If there is no comparison, or nothing is measured yet.
        MissingDependencyError: If Matplotlib, Jinja2, Optuna or SciPy is not installed.
    """
    return make_report(directory).page


def make_report(directory: str | os.PathLike[str]) -> Report:
    """Do as `write_report`, and return what was written; see there."""
    results = load_results(directory)
    _require()
    from ift_tune.compare.findings import find
    from ift_tune.compare.verdict import judge
    from ift_tune.report.drawing import draw_all
    from ift_tune.report.markdown import markdown
    from ift_tune.report.page import page
    from ift_tune.report.summary import summary_tables

    out = Path(directory)
    findings = find(results)
    verdict = judge(findings)
    drawn = draw_all(findings)
    tables = dict(zip(Results._fields, results, strict=True))
    for name, table in tables.items():
        _write_table(out / name, table, replace=False)
    summaries = summary_tables(findings)
    for name, table in summaries.items():
        _write_table(out / name, table, replace=True)
    report = Report(out / "report.html", out / "report.md", out / "figures", verdict.headline)
    report.figures.mkdir(exist_ok=True)
    for figure in drawn:
        write_atomically(report.figures / f"{figure.shown.name}.svg", figure.shown.svg)
        write_atomically(report.figures / f"{figure.shown.name}.png", figure.png)
    csv = {name: _csv(table) for name, table in (tables | summaries).items()}
    text = page(findings, verdict, [figure.shown for figure in drawn], csv)
    write_atomically(report.summary, markdown(findings, verdict).encode())
    write_atomically(report.page, text.encode())
    return report


def _require() -> None:
    for module, extra in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"a report needs {module.partition('.')[0]}: pip install 'ift_tune[{extra}]'"
            ) from error


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


def _write_table(path: Path, table: pd.DataFrame, *, replace: bool) -> None:
    """Write a table as CSV and parquet; without `replace`, only what is missing."""
    csv, parquet = path.with_suffix(".csv"), path.with_suffix(".parquet")
    if replace or not csv.exists():
        write_atomically(csv, _csv(table))
    if replace or not parquet.exists():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write_atomically(parquet, buffer.getvalue())
