"""What a figure of the report is, the panels that figures share, and the way to files and page."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ift_tune.compare.findings import Findings

INK = "#010203"
"""Colour of text and axes in figures; in the page it becomes the colour of the text around."""

Which: TypeAlias = Literal["x", "y"]
SECTIONS = ("anytime", "final", "gap", "learned", "health", "search")
"""Parts of the page that hold figures."""

_LOG_SPAN = 10.0  # ratio of the ends from which an axis of values is logarithmic
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_POINTS_PER_INCH, _PIXELS_PER_INCH = 72.0, 96.0
_LEAST_SCALE, _LARGEST_SCALE = 0.7, 1.25  # a narrower screen scrolls
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "ift_tune",  # the same ids each time
    "svg.fonttype": "none",  # text stays text: small, searchable, in the font of the page
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "hatch.linewidth": 0.5,
    "hatch.color": INK,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


class Drawn(NamedTuple):
    """A figure with its description: made together, from the same numbers.

    Attributes:
        figure: The figure.
        alt: What it shows, in words and numbers, for those who do not see it.
    """

    figure: Figure
    alt: str


@dataclass(frozen=True)
class Drawing:
    """A figure of the report. A new one is a file in `figures` and a line in its ``__init__``.

    Attributes:
        name: Of its files.
        section: One of `SECTIONS`: where it stands in the page.
        caption: What is seen, under the figure.
        draw: Draws and describes it from the findings; None if there is nothing to draw.
    """

    name: str
    section: str
    caption: str
    draw: Callable[[Findings], Drawn | None]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches.

    Not by pyplot, which keeps every figure alive and may want a display.
    """
    return Figure(figsize=(width, height), layout="constrained")


def one_panel(*, width: float = 4.7, height: float = 3.4) -> tuple[Figure, Axes]:
    """Return a figure with one panel, of a size that a phone can show."""
    figure = new_figure(width, height)
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
    figure = new_figure(width * columns, height * rows)
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
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    _mark_decades(axes.xaxis if which == "x" else axes.yaxis, low, high)


def _mark_decades(axis: Axis, low: float, high: float) -> None:
    # Matplotlib's own ticks are powers of ten alone: too few on a short axis.
    decades = math.log10(high / low) if high > low else 0.0
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if decades > 0.6 else MaxNLocator(5))
    _write_plainly(axis)
    axis.set_minor_locator(NullLocator())


def _write_plainly(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def plain_numbers(figure: Figure) -> None:
    """Put plain numbers on every logarithmic axis that still has Matplotlib's own.

    Those are mathematical text, which `_STYLE` shows raw, as names may hold a dollar sign.
    """
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatter):
            if axis.get_scale() == "log":
                _mark_decades(axis, *sorted(axis.get_view_interval()))
            else:  # a symmetric one counts from 0 on
                _write_plainly(axis)


def spread_axis(axes: Axes, which: Which, values: NDArray[np.float64]) -> None:
    """Make an axis logarithmic where its values are positive and far apart."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0.0 and finite.max() / finite.min() > _LOG_SPAN:
        log_axis(axes, which, float(finite.min()), float(finite.max()))


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


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Make Matplotlib draw the same everywhere, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@dataclass(frozen=True)
class Rendered:
    """A figure as files.

    Attributes:
        svg: For dark and light surroundings: ink has the colour of the text around.
        png: On white.
    """

    svg: bytes
    png: bytes


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure on white; the ending of the file chooses the format."""
    plain_numbers(figure)
    figure.savefig(path, dpi=150, facecolor="white")


def render(figure: Figure) -> Rendered:
    """Return the figure as files, the same bytes each time."""
    plain_numbers(figure)
    svg, png = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        # The page's font may well have what Matplotlib's own has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # it is laid out now
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    text = re.sub(re.escape(INK), "currentColor", svg.getvalue().decode(), flags=re.IGNORECASE)
    return Rendered(text.encode(), png.getvalue())


def inline(svg: bytes, *, name: str, alt: str) -> str:
    """Return an SVG file as an element of a page that holds several.

    Args:
        svg: From `render`.
        name: Goes before every id, which would otherwise be there twice.
        alt: What it shows, in words.
    """
    for prefix, uri in (("", _SVG), ("xlink", _XLINK)):
        ElementTree.register_namespace(prefix, uri)
    root = ElementTree.fromstring(svg)
    for unused in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}defs[{{{_SVG}}}style]"):
        for element in root.findall(unused):  # a style would hold for the whole page
            root.remove(element)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    # Without a size of its own it takes that of the page's column; the text must stay readable.
    points = float(str(root.attrib.pop("width")).removesuffix("pt"))
    del root.attrib["height"]
    pixels = points * _PIXELS_PER_INCH / _POINTS_PER_INCH
    least, largest = _LEAST_SCALE * pixels, _LARGEST_SCALE * pixels
    root.set("style", f"min-width:{least:.0f}px;max-width:{largest:.0f}px")
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")
