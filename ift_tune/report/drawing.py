"""Draw every figure that there is something to draw for."""

from __future__ import annotations

from dataclasses import dataclass

from ift_tune.compare.findings import Findings
from ift_tune.report.figures import FIGURES
from ift_tune.report.page import Shown
from ift_tune.report.svg import drawing_style, render


@dataclass(frozen=True)
class Drawn:
    """A figure, for the page and as a picture.

    Attributes:
        shown: For the page.
        png: On white.
    """

    shown: Shown
    png: bytes


def draw_all(findings: Findings) -> list[Drawn]:
    """Return the figures, in the order of `FIGURES`."""
    drawn = []
    with drawing_style():
        for drawing in FIGURES:
            figure = drawing.draw(findings)
            if figure is None:
                continue
            files = render(figure)
            alt = drawing.alt(findings)
            shown = Shown(drawing.name, drawing.section, drawing.caption, alt, files.svg)
            drawn.append(Drawn(shown, files.png))
    return drawn
