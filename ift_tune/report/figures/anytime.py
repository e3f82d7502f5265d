"""What each arm had found at each cost: by the search value, and by what that is worth on test."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.compare.pairwise import Curve
from ift_tune.report.drawing import Drawing, Drawn, log_axis, one_panel, spread_axis
from ift_tune.report.words import arm_label, arm_style, cost_name, format_number, metric_name

_MARKS = 8  # on a line: enough to tell it from others without colour


def _search(findings: Findings) -> Drawn | None:
    curves = _with_points({arm.name: arm.search_curve for arm in findings.arms})
    if not curves:
        return None
    name = metric_name(findings.metric)
    alt = f"Line chart of the best {name} so far against the cost. At the end: {_ends(curves)}."
    return Drawn(_over_cost(curves, f"best {name} so far", cost_name(findings)), alt)


def _test(findings: Findings) -> Drawn | None:
    curves = _with_points({arm.name: arm.retrained_curve for arm in findings.arms})
    if not curves:
        return None
    alt = (
        f"Line chart of the test {findings.measure} after retraining what was best so far, "
        f"against the cost. At the end: {_ends(curves)}."
    )
    label = f"test {findings.measure} after retraining"
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
        "search sees it, so it may rise.",
        draw=_test,
    ),
)
