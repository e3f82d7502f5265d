"""Pictures made from the tables; the only part that imports Matplotlib."""

from ift_tune.report.curves import STYLES, draw_curves

__all__ = ["STYLES", "draw_curves"]
