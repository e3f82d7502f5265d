"""The figure of a certificate: what the hypergradient predicts, against what retraining does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ift_tune.base.errors import UsageError
from ift_tune.base.files import damaged
from ift_tune.report.runs import in_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CERTIFICATE = "certificate"
_KINDS: dict[str, dict[str, Any]] = {
    "gradient": {"label": "along the hypergradient", "color": "#e45756", "marker": "s"},
    "random": {"label": "random directions", "color": "#4c78a8", "marker": "o"},
    "left out": {"label": "examples left out", "color": "#b79a20", "marker": "^"},
}
"""How each kind of displacement is drawn."""

_SOLVES = {"predicted": "the run's inverse", "predicted_longer": "a longer solve"}


def load_certificate(directory: str | os.PathLike[str]) -> pd.DataFrame | None:
    """Return the table of a run's certificate, None where there is none.

    Raises:
        UsageError: If it cannot be read.
    """
    path = Path(directory) / f"{_CERTIFICATE}.parquet"
    if not path.exists():
        return None
    try:
        table = pd.read_parquet(path)
        table.attrs[_CERTIFICATE]["sentence"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return table


def sentence_of(table: pd.DataFrame) -> str:
    """Return the verdict in words."""
    found = table.attrs[_CERTIFICATE]
    return f"{found['sentence']}: {found['verdict']}."


@in_style
def draw_certificate(table: pd.DataFrame, path: str | os.PathLike[str]) -> Figure:
    """Draw retrained against predicted changes of the search loss, and save the figure.

    Args:
        table: Of `load_certificate`.
        path: File to write.

    Returns:
        The figure.

    Raises:
        UsageError: If the table has no row.
        MissingDependencyError: If Matplotlib is not installed.
    """
    rows = table[table["split"] == "search"]
    if rows.empty:
        raise UsageError("the certificate has nothing to draw: make it again, got an empty table")
    from ift_tune.report.drawing import new_figure, save_figure

    parts = {str(kind): part for kind, part in rows.groupby("kind")}
    # A panel for each kind: their changes differ by orders of magnitude.
    figure = new_figure(3.2 * len(parts), 3.2)
    grid = figure.subplots(1, len(parts), squeeze=False)
    for axes, (kind, part) in zip(grid[0], parts.items(), strict=True):
        style = _KINDS.get(kind, {"label": kind, "marker": "x"})
        for column, face in (("predicted", None), ("predicted_longer", "none")):
            if column in part:
                axes.plot(
                    part[column],
                    part["retrained"],
                    linestyle="",
                    alpha=0.8,
                    markerfacecolor=face or style.get("color"),
                    **{**style, "label": _SOLVES[column]},
                )
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="#86888c", linewidth=1, label="as predicted")
        axes.set(title=style["label"], xlabel="predicted change", xlim=ends)
        axes.ticklabel_format(scilimits=(-2, 3))
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("search loss after retraining, change")
    grid[0][0].legend(frameon=False, fontsize=7.5)
    save_figure(figure, path)
    return figure
