"""The figures of the report, one a file. A new one is a file here and a line in `FIGURES`."""

from ift_tune.report.figures import (
    final,
    gap,
    history,
    importance,
    learned,
    search_curve,
    slices,
    solve_health,
    solve_status,
    test_curve,
)
from ift_tune.report.figures.base import SECTIONS, Drawing

FIGURES: list[Drawing] = [
    search_curve.FIGURE,
    test_curve.FIGURE,
    final.FIGURE,
    gap.FIGURE,
    learned.FIGURE,
    solve_status.FIGURE,
    solve_health.FIGURE,
    history.FIGURE,
    slices.FIGURE,
    importance.FIGURE,
]
"""Every figure, in the order of the page."""

__all__ = ["FIGURES", "SECTIONS", "Drawing"]
