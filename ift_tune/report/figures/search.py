"""The trials of the arms that search: their history, what they varied, and what mattered."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from ift_tune.compare.findings import Findings
from ift_tune.report.drawing import Drawing, Drawn, best_first, panels, spread_axis, whole_axis
from ift_tune.report.words import (
    aimed_name,
    arm_label,
    arm_style,
    format_number,
    format_share,
    metric_name,
    parameter_name,
)
from ift_tune.search.analysis import parameter_importances

_MOST_DOTS = 150  # in a panel


def _history(findings: Findings) -> Drawn | None:
    if not findings.searches:
        return None
    figure, grid = panels(len(findings.searches), columns=2, width=3.6, height=2.5)
    texts = []
    for axes, (name, search) in zip(grid, findings.searches.items(), strict=True):
        style, trials = arm_style(name), search.measured
        axes.plot(
            trials["trial"], trials["best_value"], "o", color=style.color, markersize=3, alpha=0.4
        )
        for _, own in trials.groupby("seed"):
            best = findings.direction.best_so_far(own["best_value"])
            axes.step(own["trial"], best, where="post", color=style.color, linewidth=1.2)
        spread_axis(axes, "y", trials["best_value"].to_numpy(dtype=float))
        whole_axis(axes.xaxis)
        axes.set(
            title=style.label,
            xlabel="trial",
            ylabel=aimed_name(findings, metric_name(findings.metric)),
        )
        best_value = format_number(findings.direction.best(trials["best_value"]))
        texts.append(f"{style.label}: {len(trials)} trials, best {best_value}")
    alt = f"Value of each trial and the best so far of each seed. {'; '.join(texts)}."
    return Drawn(figure, alt)


def _slices(findings: Findings) -> Drawn | None:
    pairs = [
        (name, search.measured, parameter)
        for name, search in findings.searches.items()
        for parameter in search.parameters
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
            ylabel=aimed_name(findings, metric_name(findings.metric)),
        )
    texts = [
        f"{arm_label(name)}: {', '.join(parameter_name(p) for p in search.parameters)}"
        for name, search in findings.searches.items()
    ]
    alt = f"Value of each trial against each parameter that was searched. {'; '.join(texts)}."
    return Drawn(figure, alt)


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


def _importance(findings: Findings) -> Drawn | None:
    # A random forest for each arm, the dearest part of a report: made once, for both.
    arms = {
        name: shares
        for name, search in findings.searches.items()
        if (shares := parameter_importances(search.complete, "best_value", search.parameters))
    }
    if not arms:
        return None
    figure, grid = panels(len(arms), columns=2, width=3.6, height=1.8)
    texts = []
    for axes, (name, shares) in zip(grid, arms.items(), strict=True):
        style = arm_style(name)
        heights = best_first(axes, [parameter_name(p) for p in shares])
        axes.barh(heights, list(shares.values()), height=0.55, color=style.color, alpha=0.85)
        axes.set(title=style.label, xlabel="share of importance", xlim=(0.0, 1.0))
        listed = ", ".join(f"{parameter_name(p)} {format_share(s)}" for p, s in shares.items())
        texts.append(f"{style.label}: {listed}")
    return Drawn(figure, f"Importance of the searched parameters. {'; '.join(texts)}.")


FIGURES = (
    Drawing(
        name="history",
        section="search",
        caption="History: a dot a trial, a line a seed for its best so far.",
        draw=_history,
    ),
    Drawing(
        name="slice",
        section="search",
        caption="Slices: a dot a trial, all seeds together, against each parameter that was "
        "searched.",
        draw=_slices,
    ),
    Drawing(
        name="importance",
        section="search",
        caption="Importance of each parameter, by Optuna's fANOVA over the complete trials of all "
        "seeds: the share of the variation of the value that it explains.",
        draw=_importance,
    ),
)
