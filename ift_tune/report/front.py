"""The trials of a search of several metrics: the first against each of the others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ift_tune.base.direction import Direction
from ift_tune.base.errors import UsageError
from ift_tune.base.objectives import FEASIBLE, PARETO, Objectives
from ift_tune.base.status import TrialStatus
from ift_tune.report.runs import in_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOR, _OTHERS, _VIOLATING = "#e45756", "#4c78a8", "#86888c"
_MOST_NUMBERS = 15  # written beside the points of a front


@in_style
def draw_front(trials: pd.DataFrame, path: str | os.PathLike[str], *, title: str = "") -> Figure:
    """Draw what each further metric buys: the first one against it, with the Pareto front.

    A panel for each further metric, a dot for each complete trial, crosses for those that violate a
    constraint. The line joins the best of the first metric at each value of the other; of three
    metrics or more, a trial may be on the front without it.

    Args:
        trials: The table of a search of several metrics.
        path: File to write; the ending chooses the format (.png, .svg, .pdf).
        title: Above the figure.

    Returns:
        The figure.

    Raises:
        UsageError: If the search had one metric, or no complete trial.
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import panels, save_figure

    objectives = Objectives.of_run(trials.attrs.get("run"))
    if not objectives.several or PARETO not in trials:
        raise UsageError(
            "a front is of several metrics: search with --metric given twice or more, got a table "
            f"of {objectives.words}"
        )
    names = [str(name) for name in objectives.metrics]
    complete = trials[trials["status"] == TrialStatus.COMPLETE.value].dropna(subset=names)
    if complete.empty:
        raise UsageError("there is nothing to draw: no trial is complete, got an empty front")
    figure, grid = panels(len(names) - 1, columns=2, width=4.7, height=3.6)
    for index, axes in enumerate(grid, start=1):
        ways = objectives.directions[0], objectives.directions[index]
        _panel(axes, complete, (names[0], names[index]), ways)
    grid[0].legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)
    return figure


def _panel(
    axes: Axes, trials: pd.DataFrame, names: tuple[str, str], ways: tuple[Direction, Direction]
) -> None:
    from ift_tune.report.drawing import spread_axis

    first, other = names
    feasible = trials[FEASIBLE] if FEASIBLE in trials else np.ones(len(trials), dtype=bool)
    for rows, label, marker, color in (
        (trials[~feasible], "violates a constraint", "x", _VIOLATING),
        (trials[feasible & ~trials[PARETO]], "dominated", "o", _OTHERS),
        (trials[trials[PARETO]], "Pareto front", "o", _COLOR),
    ):
        if len(rows):
            axes.scatter(rows[other], rows[first], s=22, label=label, marker=marker, color=color)
    spread_axis(axes, "x", trials[other].to_numpy(dtype=float))
    spread_axis(axes, "y", trials[first].to_numpy(dtype=float))
    front = trials[trials[PARETO]].sort_values(other, ascending=ways[1] is Direction.MIN)
    best = front[front[first] == ways[0].best_so_far(front[first])]
    axes.step(best[other], best[first], where="post", color=_COLOR, linewidth=1.2, zorder=1)
    if len(front) <= _MOST_NUMBERS:
        for row in front.drop_duplicates(list(names)).to_dict("records"):
            axes.annotate(
                str(row["trial"]),
                (row[other], row[first]),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7.5,
            )
    axes.set(
        xlabel=f"{other.replace('_', ' ')} ({ways[1].words})",
        ylabel=f"{first.replace('_', ' ')} ({ways[0].words})",
    )
