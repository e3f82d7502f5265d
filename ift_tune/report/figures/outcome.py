"""What each search had found at each cost, and what it came to in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ift_tune.base.direction import Direction
from ift_tune.base.views import unpack
from ift_tune.compare.findings import ArmFindings, Findings
from ift_tune.compare.pairwise import Curve
from ift_tune.compare.verdict import capitalise
from ift_tune.report.drawing import (
    INK,
    Drawing,
    Drawn,
    best_first,
    log_axis,
    one_panel,
    spread_axis,
)
from ift_tune.report.runs import compose
from ift_tune.report.words import (
    aimed_name,
    arm_label,
    arm_style,
    cost_name,
    format_mean,
    format_number,
    metric_name,
    optimism_name,
)
from ift_tune.trial.tables import VIEWS

_MARKS = 8  # on a line: enough to tell it from others without colour


def _search(findings: Findings) -> Drawn | None:
    curves = _with_points({arm.name: arm.search_curve for arm in findings.arms})
    if not curves:
        return None
    name = metric_name(findings.metric)
    alt = f"Line chart of the best {name} so far against the cost. At the end: {_ends(curves)}."
    label = aimed_name(findings, f"best {name} so far")
    return Drawn(_over_cost(curves, label, cost_name(findings)), alt)


def _test(findings: Findings) -> Drawn | None:
    curves = _with_points({arm.name: arm.retrained_curve for arm in findings.arms})
    if not curves:
        return None
    alt = (
        f"Line chart of the test {findings.measure} after retraining what was best so far, "
        f"against the cost. At the end: {_ends(curves)}."
    )
    label = aimed_name(findings, f"test {findings.measure} after retraining")
    return Drawn(_over_cost(curves, label, cost_name(findings)), alt)


def _with_points(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if len(curve.cost)}


def _over_cost(curves: Mapping[str, Curve], label: str, cost: str) -> Figure:
    """Draw the mean of each arm with its band against the cost."""
    figure, axes = one_panel()
    for place, (name, curve) in enumerate(curves.items()):
        style = arm_style(name)
        every = max(1, len(curve.cost) // _MARKS)
        # Each line has its marks at other places, so that they do not hide each other.
        axes.plot(
            curve.cost, curve.mean, linewidth=1.6, markevery=(place % every, every), **style.line
        )
        axes.fill_between(
            curve.cost, curve.low, curve.high, color=style.color, alpha=0.14, linewidth=0
        )
    costs = np.concatenate([curve.cost for curve in curves.values()])
    log_axis(axes, "x", float(costs.min()), float(costs.max()))
    spread_axis(axes, "y", np.concatenate([curve.mean for curve in curves.values()]))
    axes.set(xlabel=f"cost of the search so far, {cost}", ylabel=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.6, fontsize=8)
    return figure


def _ends(curves: Mapping[str, Curve]) -> str:
    """Say where each curve ends."""
    return ", ".join(
        f"{arm_label(name)} {format_number(float(curve.mean[-1]))}"
        for name, curve in curves.items()
    )


def _final(findings: Findings) -> Drawn:
    arms = findings.arms
    figure, axes = one_panel(height=1.2 + 0.38 * len(arms))
    heights = best_first(axes, [arm_label(arm.name) for arm in arms])
    for arm, height in zip(arms, heights, strict=True):
        style, interval = arm_style(arm.name), arm.retrained
        own = findings.chosen[findings.chosen["arm"] == arm.name]["retrained"]
        axes.plot(own, [height - 0.22] * len(own), "o", color=style.color, markersize=3, alpha=0.5)
        if math.isfinite(interval.low):
            axes.plot([interval.low, interval.high], [height] * 2, color=style.color, linewidth=2.5)
        axes.plot(
            [interval.mean],
            [height],
            color=style.color,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            **style.mark | {"markersize": 7},
        )
    axes.set_xlabel(aimed_name(findings, f"test {findings.measure} after retraining"))
    rows = [f"{arm_label(arm.name)} {format_mean(arm.retrained)}" for arm in arms]
    return Drawn(
        figure, f"Test {findings.measure} after retraining, best first: {'; '.join(rows)}."
    )


def _gap(findings: Findings) -> Drawn:
    arms = findings.arms
    figure, axes = one_panel(height=1.5 + 0.42 * len(arms))
    heights = best_first(axes, [arm_label(arm.name) for arm in arms])
    for arm, height in zip(arms, heights, strict=True):
        color = arm_style(arm.name).color
        chosen = findings.chosen[findings.chosen["arm"] == arm.name]
        optimism = findings.direction.sign * (chosen["retrained"] - chosen["search"])
        gaps = findings.direction.sign * (chosen["test"] - chosen["val"])
        _gap_row(axes, optimism, height + 0.14, "o", color, color)
        _gap_row(axes, gaps, height - 0.14, "s", color, "none")
    axes.axvline(0.0, color=INK, linewidth=0.8)
    order = slice(None) if findings.direction is Direction.MIN else slice(None, None, -1)
    optimism_label = " − ".join(("test after retraining", "search")[order])
    gap_label = " − ".join(("test", "validation")[order])
    for marker, face, label in (
        ("o", INK, optimism_label),
        ("s", "none", f"{gap_label}, at the weights of the choice"),
    ):
        axes.plot(
            [], [], marker, markerfacecolor=face, markeredgecolor=INK, markersize=6, label=label
        )
    axes.set_xlabel(f"difference of {findings.measure}")
    figure.legend(loc="outside upper left", frameon=False, ncols=1)
    alt = (
        f"{capitalise(optimism_name(findings))}, mean over seeds: "
        f"{'; '.join(_gap_text(arm, gap_label) for arm in arms)}."
    )
    return Drawn(figure, alt)


def _gap_row(
    axes: Axes, gaps: pd.Series[float], height: float, marker: str, color: str, face: str
) -> None:
    """Draw each seed faintly and the mean over them."""
    gaps = gaps.dropna()
    if gaps.empty:
        return
    look: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": color}
    axes.plot(gaps, [height] * len(gaps), marker, markersize=3, alpha=0.5, **look)
    axes.plot([gaps.mean()], [height], marker, markersize=7, markeredgewidth=1.5, **look)


def _gap_text(arm: ArmFindings, gap_label: str) -> str:
    text = f"{arm_label(arm.name)} {format_number(arm.optimism)}"
    if math.isfinite(arm.val_test_gap):
        text += f" ({gap_label.replace('−', 'minus')} {format_number(arm.val_test_gap)})"
    return text


def _learned(findings: Findings) -> Drawn | None:
    views = unpack(findings.about.get(VIEWS, "[]"))
    if not views:
        return None
    titles = ", ".join(view.title for view in views)
    return Drawn(compose(views), f"Pictures of the learned hyperparameters: {titles}.")


FIGURES = (
    Drawing(
        name="anytime-search",
        section="anytime",
        caption="Best value on the search split so far, by which each search chooses: mean over "
        "seeds with its 95 % bootstrap band. A line begins where every seed has found something.",
        draw=_search,
    ),
    Drawing(
        name="anytime-test",
        section="anytime",
        caption="What the best so far is worth: its test value after retraining from scratch. No "
        "search sees it, so it may become worse.",
        draw=_test,
    ),
    Drawing(
        name="final",
        section="final",
        caption="Test value after retraining what each search chose: mean, its 95 % bootstrap "
        "interval and, below it, every seed.",
        draw=_final,
    ),
    Drawing(
        name="gap",
        section="gap",
        caption="Right of 0 the choice looked better than it is. Large marks are means over "
        "seeds, small ones single seeds. Arms that train nothing on the validation split have no "
        "square.",
        draw=_gap,
    ),
    Drawing(
        name="learned",
        section="learned",
        caption="The hyperparameters that the first search of IFT chose.",
        draw=_learned,
    ),
)
