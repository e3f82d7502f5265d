"""Figures and pages, made from the tables; the only part that imports Matplotlib."""

from ift_tune.report.artifacts import upload_artifacts
from ift_tune.report.front import draw_front
from ift_tune.report.runs import STYLES, draw_curves, draw_pictures
from ift_tune.report.write import Report, make_report, write_report

__all__ = [
    "STYLES",
    "Report",
    "draw_curves",
    "draw_front",
    "draw_pictures",
    "make_report",
    "upload_artifacts",
    "write_report",
]
