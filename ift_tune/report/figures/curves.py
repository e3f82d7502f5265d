"""Curves over the cost, one an arm: what both anytime figures share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ift_tune.compare.findings import Curve, Findings
from ift_tune.report.figures.base import log_axis, one_panel, spread_axis
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import cost_name, number

_MARKS = 8  # on a line: enough to tell it from others without colour


def draw_over_cost(findings: Findings, curves: Mapping[str, Curve], label: str) -> Figure | None:
    """Draw the mean of each arm with its band against the cost; None if no arm has a curve."""
    curves = {name: curve for name, curve in curves.items() if len(curve.cost)}
    if not curves:
        return None
    figure, axes = one_panel()
    for place, (name, curve) in enumerate(curves.items()):
        style = arm_style(name)
        every = max(1, len(curve.cost) // _MARKS)
        axes.plot(
            curve.cost, curve.mean, linewidth=1.6, markevery=(place % every, every), **style.line
        )
        axes.fill_between(
            curve.cost, curve.low, curve.high, color=style.color, alpha=0.14, linewidth=0
        )
    cost = np.concatenate([curve.cost for curve in curves.values()])
    log_axis(axes, "x", float(cost.min()), float(cost.max()))
    spread_axis(axes, "y", np.concatenate([curve.mean for curve in curves.values()]))
    axes.set(xlabel=f"cost of the search so far, {cost_name(findings)}", ylabel=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.6, fontsize=8)
    return figure


def ends(curves: Mapping[str, Curve]) -> str:
    """Say where each curve ends."""
    return ", ".join(
        f"{arm_style(name).label} {number(float(curve.mean[-1]))}"
        for name, curve in curves.items()
        if len(curve.cost)
    )
