"""How each arm is called and drawn, in every figure and table, as the arm itself says."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from ift_tune.base.imports import require
from ift_tune.compare.arms import ARMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Colour of text and axes in figures; in the page it becomes the colour of the text around."""


class ArmStyle(NamedTuple):
    """An arm in figures and tables. Colour is never the only difference: dashes and marks differ.

    Attributes:
        label: Its name.
        color: To be read on white and on near-black.
        dashes: Lengths of strokes and gaps, in line widths; empty for a whole line.
        marker: Matplotlib's name of its mark.
    """

    label: str
    color: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Matplotlib's arguments for a line."""
        style: Any = (0, self.dashes) if self.dashes else "-"
        return {"label": self.label, "color": self.color, "linestyle": style} | self.mark

    @property
    def mark(self) -> dict[str, Any]:
        """Matplotlib's arguments for its mark."""
        return {"marker": self.marker, "markersize": 4.5}


_OTHER_COLORS = ("#a8605a", "#5a7fa8", "#7d8f4e", "#9a6fa0")


def arm_style(name: str) -> ArmStyle:
    """Return how an arm is drawn; one that we do not know has one of four other colours."""
    if name in ARMS:
        arm = ARMS[name]
        return ArmStyle(arm.label, arm.style.color, arm.style.dashes, arm.style.marker)
    # Not Python's own hash, which differs from process to process.
    color = _OTHER_COLORS[zlib.crc32(name.encode()) % len(_OTHER_COLORS)]
    return ArmStyle(name, color, (2, 2), "h")


def arm_label(name: str) -> str:
    """Return what figures and tables call an arm."""
    return arm_style(name).label


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    # Not pyplot, which keeps every figure alive and may want a display.
    module = require("matplotlib.figure", extra="report", what="a figure")
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure
