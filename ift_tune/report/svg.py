"""From a Matplotlib figure to files and to SVG that stands in a page."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from ift_tune.report.palette import INK

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


def render(figure: Figure) -> Rendered:
    """Return the figure as files, the same bytes each time."""
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
        for found in root.findall(unused):  # a style would hold for the whole page
            root.remove(found)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    points = float(str(root.attrib.pop("width")).removesuffix("pt"))
    del root.attrib["height"]
    pixels = points * _PIXELS_PER_INCH / _POINTS_PER_INCH
    least, largest = _LEAST_SCALE * pixels, _LARGEST_SCALE * pixels
    root.set("style", f"min-width:{least:.0f}px;max-width:{largest:.0f}px")
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")
