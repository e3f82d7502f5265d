"""The value of each trial against each parameter that its arm searched."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, panels, spread_axis
from ift_tune.report.figures.searches import searched, searching
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import metric_name, parameter_name

_MOST_DOTS = 150  # in a panel


def _draw(findings: Findings) -> Figure | None:
    pairs = [
        (name, trials, parameter)
        for name, trials in searching(findings).items()
        for parameter in searched(trials)
    ]
    if not pairs:
        return None
    figure, grid = panels(len(pairs), columns=3, width=2.5, height=2.2)
    for axes, (name, trials, parameter) in zip(grid, pairs, strict=True):
        known = trials.dropna(subset=[parameter])
        values = known["best_value"].to_numpy(dtype=float)
        style = arm_style(name)
        at = _positions(axes, known[parameter])
        # Thousands of dots would make the page heavy: they become a picture.
        many = len(values) > _MOST_DOTS
        axes.plot(at, values, "o", color=style.color, markersize=3, alpha=0.5, rasterized=many)
        spread_axis(axes, "y", values)
        axes.set(
            title=style.label,
            xlabel=parameter_name(parameter),
            ylabel=metric_name(findings.metric),
        )
    return figure


def _positions(axes: Axes, column: pd.Series[Any]) -> list[float]:
    """Return where the values lie; words (and yes or no) lie side by side."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        numbers = column.to_numpy(dtype=float)
        spread_axis(axes, "x", numbers)
        return [float(value) for value in numbers]
    words = [str(value) for value in column]
    known = sorted(set(words))
    axes.set_xticks(range(len(known)), known)
    return [float(known.index(word)) for word in words]


def _alt(findings: Findings) -> str:
    texts = [
        f"{arm_style(name).label}: {', '.join(parameter_name(p) for p in searched(trials))}"
        for name, trials in searching(findings).items()
    ]
    return f"Value of each trial against each parameter that was searched. {'; '.join(texts)}."


FIGURE = Drawing(
    name="slice",
    section="search",
    caption="Slices: a dot a trial, all seeds together, against each parameter that was searched.",
    alt=_alt,
    draw=_draw,
)
