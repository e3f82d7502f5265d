"""Figures and pages, made from the tables; the only part that imports Matplotlib."""

from ift_tune.report.curves import STYLES, draw_curves
from ift_tune.report.pictures import draw_pictures
from ift_tune.report.write import Report, make_report, write_report

__all__ = ["STYLES", "Report", "draw_curves", "draw_pictures", "make_report", "write_report"]
