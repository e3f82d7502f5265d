"""Training, validation and test curves of one run, drawn from its `steps` table alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pandas as pd

from ift_tune.base.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "train": {"label": "training", "color": "#4c78a8", "linestyle": "--"},
    "val": {"label": "validation", "color": "#4c78a8", "linestyle": "-"},
    "search": {"label": "search", "color": "#b79a20", "linestyle": ":"},
    "test": {"label": "test", "color": "#e45756", "linestyle": "-"},
}
"""How each split is drawn, in every figure."""


def draw_curves(
    steps: pd.DataFrame, path: str | os.PathLike[str], *, kind: str | None = None, title: str = ""
) -> Figure:
    """Draw what each split measures against the outer step, and save the figure.

    Several trials (or seeds) give their median as a line and their range as a band.

    Args:
        steps: A `steps` table.
        path: File to write; the ending chooses the format (.png, .svg, .pdf).
        kind: ``"error"`` or ``"loss"``; default: error where there is one.
        title: Above the figure.

    Returns:
        The figure.

    Raises:
        UsageError: If the table has no such column.
        MissingDependencyError: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "figures need Matplotlib: pip install 'ift_tune[report]'"
        ) from error
    if kind is None:
        has_error = "val_error" in steps and steps["val_error"].notna().any()
        kind = "error" if has_error else "loss"
    columns = {s: f"{s}_{kind}" for s in STYLES if f"{s}_{kind}" in steps}
    if not any(steps[column].notna().any() for column in columns.values()):
        raise UsageError(f"the table has no {kind} to draw")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for split, column in columns.items():
        measured = steps[["step", column]].dropna().astype(float)
        if measured.empty:
            continue
        by_step = measured.groupby("step")[column]
        axes.plot(by_step.median(), linewidth=2, **STYLES[split])
        axes.fill_between(
            sorted(measured["step"].unique()),
            by_step.min(),
            by_step.max(),
            color=STYLES[split]["color"],
            alpha=0.12,
            linewidth=0,
        )
    axes.set(xlabel="outer step", ylabel=f"{kind}", title=title, xscale="log")
    axes.set_ylim(bottom=0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return figure
