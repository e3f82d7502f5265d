"""The figures of the report. A new one is a file here with its `FIGURES`, and a line below."""

from importlib import import_module

from ift_tune.report.drawing import Drawing

_FILES = (
    "outcome",
    "health",
    "search",
)
FIGURES: list[Drawing] = [
    drawing for file in _FILES for drawing in import_module(f"{__name__}.{file}").FIGURES
]
"""Every figure, in the order of the page."""

__all__ = ["FIGURES"]
