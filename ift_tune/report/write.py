"""Write the report of a comparison beside its tables."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path, PosixPath, WindowsPath
from typing import TYPE_CHECKING, Any

from ift_tune.base.arguments import require_path
from ift_tune.base.cards import Card
from ift_tune.base.errors import require
from ift_tune.base.files import csv_bytes, parquet_bytes, write_atomically
from ift_tune.trial.tables import Results, load_results

if TYPE_CHECKING:
    from ift_tune.compare.findings import Findings
    from ift_tune.report.page import PageFigure

_NEEDED = {
    "matplotlib.figure": "report",
    "jinja2": "report",
    "optuna": "compare",
    "scipy": "compare",
}
"""Libraries by the extra that brings them; imported late, as a run's own curves need none."""


if sys.platform == "win32":  # there is one of the two in each system that can be made
    _SystemPath = WindowsPath
else:
    _SystemPath = PosixPath

_FIRST_FIGURE = "anytime-test"


@dataclass(frozen=True)
class Report:
    """A report that was written. Shown in a notebook it has the verdict and the first figure.

    Attributes:
        page: The HTML page.
        summary: The Markdown.
        figures: The folder of the figures.
        headline: The verdict's first sentence.
        notes: What limits the answer: too few seeds, unfinished searches.
    """

    page: Path
    summary: Path
    figures: Path
    headline: str
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return plain values, for programs that read what the command line prints."""
        files = {"report": str(self.page), "summary": str(self.summary)}
        return {"headline": self.headline, "notes": list(self.notes), **files}

    def __repr__(self) -> str:
        return self._card().text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._card().html()

    def _card(self) -> Card:
        folder = self.page.parent
        figures = sorted(path.relative_to(folder).as_posix() for path in self.figures.glob("*.svg"))
        return Card(
            self.headline,
            folder=folder,
            files=[self.page.name, self.summary.name, *figures],
            picture=f"{self.figures.name}/{_FIRST_FIGURE}.svg",
            alt="test value of the best so far of each arm, over the cost",
        )


class ReportPage(_SystemPath):
    """The path of a report's page, which a notebook shows as its `Report`."""

    report: Report | None = None  # none of a path that was made from this one, or unpickled

    def with_segments(self, *segments: str | os.PathLike[str]) -> Path:
        """Return a plain path for what is derived from this one."""
        return Path(*segments)

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows; None leaves it to the path's ``repr``."""
        return None if self.report is None else self.report._repr_html_()


def write_report(directory: str | os.PathLike[str]) -> ReportPage:
    """Write the report of a comparison from its tables; nothing is run again.

    The directory then holds ``report.html`` (one file that needs no other), ``report.md``,
    ``figures/`` and the tables ``final``, ``chosen`` and ``against`` as CSV and parquet. The same
    tables give the same bytes.

    Args:
        directory: Where ``trials.parquet`` and ``steps.parquet`` of a comparison are, finished or
            not.

    Returns:
        The path of the page. A notebook shows the verdict and the first figure with it.

    Raises:
        UsageError: If there is no comparison, or nothing is measured yet.
        MissingDependencyError: If Matplotlib, Jinja2, Optuna or SciPy is not installed.

    Example:
        With tables made by hand, of one trial of one step for each search; `run_comparison` makes
        real ones.

        >>> import pandas as pd
        >>> errors = {"ift": [0.10, 0.12, 0.11], "random": [0.20, 0.19, 0.22]}
        >>> table = pd.DataFrame(
        ...     {"arm": arm, "seed": seed, "trial": 0, "step": 1, "status": "complete",
        ...      "gradient_equivalents": 100.0, "wall_seconds": 1.0,
        ...      "best_value": error, "best_step": 1, "search_error": error,
        ...      "test_error": error, "retrained_test_error": error}
        ...     for arm, found in errors.items() for seed, error in enumerate(found)
        ... )
        >>> table.attrs["run"] = {
        ...     "task": "toy", "backend": "compare", "metric": None,
        ...     "budget": {"gradient_equivalents": 100.0, "seconds": None},
        ...     "extent": {"arms": list(errors), "seeds": [0, 1, 2]},
        ... }
        >>> table.to_parquet("trials.parquet")
        >>> table.to_parquet("steps.parquet")
        >>> write_report(".").name
        'report.html'
        >>> print(Path("report.md").read_text()[:17])
        # toy: comparison
    """
    report = make_report(directory)
    page = ReportPage(report.page)
    page.report = report
    return page


def make_report(directory: str | os.PathLike[str], results: Results | None = None) -> Report:
    """Do as `write_report`, and return what was written; see there.

    Args:
        directory: The run directory.
        results: Its tables, where they have been loaded already.
    """
    results = load_results(directory) if results is None else results
    # The mistake is said before anything is computed, and the tables stay as they are.
    for module, extra in _NEEDED.items():
        require(module, extra=extra, what="a report")
    from ift_tune.compare.findings import find
    from ift_tune.compare.verdict import judge
    from ift_tune.report.page import page
    from ift_tune.report.summary import markdown, summarise, summary_tables

    out = require_path("the report's directory", directory)
    findings = find(results)
    verdict = judge(findings)
    summary = summarise(findings)
    figures, pictures = _drawn(findings)
    tables = dict(zip(Results._fields, results, strict=True))
    summaries = summary_tables(findings)
    csv = {}
    for name, table in (tables | summaries).items():
        csv[name] = csv_bytes(table)
        for ending, content in ((".csv", csv[name]), (".parquet", parquet_bytes(table))):
            # The run's own two stay: it may be writing them at this moment.
            if name in summaries or not (out / f"{name}{ending}").exists():
                write_atomically(out / f"{name}{ending}", content)
    files = out / "report.html", out / "report.md", out / "figures"
    report = Report(*files, verdict.headline, tuple(verdict.notes))
    report.figures.mkdir(exist_ok=True)
    for name, content in pictures.items():
        write_atomically(report.figures / name, content)
    write_atomically(report.summary, markdown(findings, verdict, summary).encode())
    # Last, so that a page is there only with what it links to.
    write_atomically(report.page, page(findings, verdict, summary, figures, csv).encode())
    return report


def _drawn(findings: Findings) -> tuple[list[PageFigure], dict[str, bytes]]:
    """Return the figures that there is something to draw for, and their files by name."""
    from ift_tune.report.drawing import drawing_style, render
    from ift_tune.report.figures import FIGURES
    from ift_tune.report.page import PageFigure

    figures, files = [], {}
    with drawing_style():
        for drawing in FIGURES:
            if (drawn := drawing.draw(findings)) is None:
                continue
            rendered = render(drawn.figure)
            figures.append(PageFigure(drawing, drawn.alt, rendered.svg))
            files[f"{drawing.name}.svg"] = rendered.svg
            files[f"{drawing.name}.png"] = rendered.png
    return figures, files
