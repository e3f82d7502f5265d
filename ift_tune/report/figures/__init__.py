"""The figures of the report, by section. A new one is a file here and a line in `FIGURES`."""

from ift_tune.report.drawing import Drawing
from ift_tune.report.figures import anytime, health, outcome, search

FIGURES: list[Drawing] = [
    *anytime.FIGURES,
    *outcome.FIGURES,
    *health.FIGURES,
    *search.FIGURES,
]
"""Every figure, in the order of the page."""

__all__ = ["FIGURES"]
