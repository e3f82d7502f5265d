"""What a figure of the report is, and what all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ift_tune.compare.findings import Array, Findings
from ift_tune.report.palette import INK

Which: TypeAlias = Literal["x", "y"]
SECTIONS = ("anytime", "final", "gap", "learned", "health", "search")
"""Parts of the page that hold figures."""

_LOG_SPAN = 10.0  # ratio of the ends from which an axis of values is logarithmic


@dataclass(frozen=True)
class Drawing:
    """One figure of the report. A new one is a file here and a line in `FIGURES`.

    Attributes:
        name: Of its files.
        section: One of `SECTIONS`: where it stands in the page.
        caption: What is seen, under the figure.
        alt: What it shows, in words, for those who do not see it.
        draw: Draws it from the findings; None if there is nothing to draw.
    """

    name: str
    section: str
    caption: str
    alt: Callable[[Findings], str]
    draw: Callable[[Findings], Figure | None]


def one_panel(*, width: float = 4.7, height: float = 3.4) -> tuple[Figure, Axes]:
    """Return a figure with one panel, of a size that a phone can show."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, tidy(figure.subplots())


def panels(count: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with some panels side by side, row by row.

    Args:
        count: How many.
        columns: Most in a row.
        width: Of a panel, inches.
        height: Of a panel, inches.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    every = [tidy(axes) for axes in grid.flat]
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def tidy(axes: Axes) -> Axes:
    """Take away what is not needed, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def log_axis(axes: Axes, which: Which, low: float, high: float) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks.

    Args:
        axes: The panel.
        which: Of its axes.
        low: Least value shown, above 0.
        high: Largest value shown.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    decades = math.log10(high / low) if high > low else 0.0
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if decades > 0.6 else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def spread_axis(axes: Axes, which: Which, values: Array) -> None:
    """Make an axis logarithmic where its values are positive and far apart."""
    found = values[np.isfinite(values)]
    if len(found) and found.min() > 0.0 and found.max() / found.min() > _LOG_SPAN:
        log_axis(axes, which, float(found.min()), float(found.max()))


def whole_axis(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def best_first(axes: Axes, labels: Sequence[str]) -> list[int]:
    """Put names on the vertical axis, the first on top, and return their heights."""
    heights = list(range(len(labels)))[::-1]
    axes.set_yticks(heights, labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return heights
