"""Figures of a single run or search: its curves, and pictures of what it has learned."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from ift_tune.base.direction import Direction
from ift_tune.base.errors import UsageError, require
from ift_tune.base.files import write_atomically
from ift_tune.base.views import HeatMap, Histogram, ImageGrid, View
from ift_tune.trial.tables import load_views

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

STYLES: dict[str, dict[str, Any]] = {
    "train": {"label": "training", "color": "#4c78a8", "linestyle": "--"},
    "val": {"label": "validation", "color": "#4c78a8", "linestyle": "-"},
    "search": {"label": "search", "color": "#b79a20", "linestyle": ":"},
    "test": {"label": "test", "color": "#e45756", "linestyle": "-"},
}
"""How each split is drawn, in every figure."""

_WIDTH = 6.4  # inches
_BINS = 40
_COLORS = ("#3f7fc4", "#e4572e", "#1f9a8a", "#b8901a", "#8a6fd1", "#86888c")


def in_style(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function draw the same everywhere, whatever the user's own settings of Matplotlib are.

    Returns:
        The function; called, it raises a `MissingDependencyError` if Matplotlib is not installed.
    """

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        require("matplotlib.figure", extra="report", what="a figure")
        from ift_tune.report.drawing import drawing_style

        with drawing_style():
            return draw(*args, **kwargs)

    return styled


@in_style
def draw_curves(
    steps: pd.DataFrame,
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    title: str = "",
    mode: str = "min",
) -> Figure:
    """Draw what each split measures against the outer step, and save the figure.

    Several trials (or seeds) give their median as a line and their range as a band.

    Args:
        steps: A `steps` table.
        path: File to write; the ending chooses the format (.png, .svg, .pdf).
        kind: What is measured, as ``"error"``, ``"loss"``, ``"accuracy"``; default: error where
            there is one, else loss.
        title: Above the figure.
        mode: ``"min"`` or ``"max"``: the direction in which it is better.

    Returns:
        The figure.

    Raises:
        UsageError: If the table has no such column.
        MissingDependencyError: If Matplotlib is not installed.
    """
    if kind is None:
        has_error = "val_error" in steps and steps["val_error"].notna().any()
        kind = "error" if has_error else "loss"
    columns = {s: f"{s}_{kind}" for s in STYLES if f"{s}_{kind}" in steps}
    if not any(steps[column].notna().any() for column in columns.values()):
        raise UsageError(f"the table has no {kind} to draw")
    from ift_tune.report.drawing import new_figure, save_figure

    figure = new_figure(_WIDTH, 4.0)
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
    label = kind.replace("_", " ")
    if mode == Direction.MAX.value:
        label = f"{label}, {Direction.MAX.words}"
    axes.set(xlabel="outer step", ylabel=label, title=title, xscale="log")
    if axes.get_ylim()[0] > 0.0:  # R² and likelihoods may be below
        axes.set_ylim(bottom=0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)
    return figure


@in_style
def draw_pictures(
    directory: str | os.PathLike[str], trials: Container[str] | None = None
) -> list[Path]:
    """Draw the hyperparameters of a finished run, or of a search's best-known trials.

    Args:
        directory: A run directory; the pictures go into its folder ``pictures``, one PNG and one
            SVG for each view, named after the trial and the title.
        trials: Of which, by the names of their folders. Default: of all.

    Returns:
        The PNG files.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import render

    folder = Path(directory) / "pictures"
    written = []
    for trial, views in load_views(directory).items():
        for view in views if trials is None or trial in trials else ():
            folder.mkdir(exist_ok=True)
            files = render(compose([view]))
            name = re.sub(r"[^\w]+", "-", f"{trial}-{view.title}").strip("-").lower()
            write_atomically(folder / f"{name}.svg", files.svg)
            write_atomically(folder / f"{name}.png", files.png)
            written.append(folder / f"{name}.png")
    return written


@in_style
def compose(views: Sequence[View]) -> Figure:
    """Return one figure with the views below each other.

    Args:
        views: At least one.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import new_figure

    heights = [_height(view) for view in views]
    figure = new_figure(_WIDTH, sum(heights))
    parts = figure.subfigures(len(views), 1, height_ratios=heights, squeeze=False)
    for view, part in zip(views, parts[:, 0], strict=True):
        part.suptitle(view.title, fontsize=9.5)
        if isinstance(view, ImageGrid):
            _image_grid(view, part)
        elif isinstance(view, HeatMap):
            _heat_map(view, part)
        else:
            _histogram(view, part)
    return figure


def _height(view: View) -> float:
    """Return how high a view is drawn at full width, in inches."""
    if isinstance(view, ImageGrid):
        rows = math.ceil(len(view.images) / view.columns)
        height, width = view.images.shape[-2:]
        captions = 0.22 * bool(view.captions)
        return 0.4 + rows * float(_WIDTH / view.columns * height / width + captions)
    return 2.6


def _image_grid(view: ImageGrid, figure: SubFigure) -> None:
    rows = math.ceil(len(view.images) / view.columns)
    grid = figure.subplots(rows, view.columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    pixels = view.shares()
    count, _, height, width = pixels.shape
    pixels = np.broadcast_to(pixels, (count, 3, height, width)).transpose(0, 2, 3, 1)  # grey is RGB
    for i, (axes, image) in enumerate(zip(grid.flat, pixels, strict=False)):
        axes.imshow(image, interpolation="nearest")
        if view.captions:
            axes.set_title(view.captions[i], fontsize=7.5, pad=2.0)


def _heat_map(view: HeatMap, figure: SubFigure) -> None:
    from matplotlib.colors import LogNorm

    from ift_tune.report.drawing import whole_axis

    axes = figure.subplots()
    values = view.values
    # Matplotlib refuses a logarithmic scale without positive numbers that differ.
    norm = LogNorm() if view.log and (values > 0.0).all() and np.ptp(values) > 0.0 else None
    shape = view.shape or values.shape
    shown = axes.imshow(
        values,
        aspect="auto",
        cmap="viridis",
        norm=norm,
        interpolation="nearest",
        # The axes count what was, not the cells.
        extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5),
    )
    for axis, name, size, cells in (
        (axes.xaxis, view.columns, shape[1], values.shape[1]),
        (axes.yaxis, view.rows, shape[0], values.shape[0]),
    ):
        whole_axis(axis)
        axis.set_label_text(name if cells == size else f"{name} ({size} in {cells} means)")
        if size == 1:
            axis.set_ticks([])
    figure.colorbar(shown, ax=axes)


def _histogram(view: Histogram, figure: SubFigure) -> None:
    axes = figure.subplots()
    groups = {name: values.ravel() for name, values in view.values.items()}
    whole = np.concatenate(list(groups.values()))
    log = view.log and bool((whole > 0.0).all())
    # The same edges for all groups, so that their heights can be compared.
    edges = np.histogram_bin_edges(np.log10(whole) if log else whole, bins=_BINS)
    if log:
        edges = 10.0**edges
        axes.set_xscale("log")
    for i, (name, values) in enumerate(groups.items()):
        color = _COLORS[i % len(_COLORS)]
        axes.hist(values, bins=edges.tolist(), alpha=0.6, label=name, color=color)
    axes.set(xlabel=view.axis, ylabel="count")
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        axes.legend(frameon=False)
