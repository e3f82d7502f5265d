"""The retrained test metric of each arm: every seed, the mean and its interval."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, best_first, one_panel
from ift_tune.report.palette import INK, arm_style
from ift_tune.report.wording import between, number


def _draw(findings: Findings) -> Figure | None:
    arms = findings.arms
    figure, axes = one_panel(height=1.2 + 0.38 * len(arms))
    heights = best_first(axes, [arm_style(arm.name).label for arm in arms])
    for arm, height in zip(arms, heights, strict=True):
        style, found = arm_style(arm.name), arm.retrained
        own = findings.chosen[findings.chosen["arm"] == arm.name]["retrained"]
        axes.plot(own, [height - 0.22] * len(own), "o", color=style.color, markersize=3, alpha=0.5)
        if math.isfinite(found.low):
            axes.plot([found.low, found.high], [height] * 2, color=style.color, linewidth=2.5)
        axes.plot(
            [found.mean],
            [height],
            color=style.color,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            **style.mark | {"markersize": 7},
        )
    axes.set_xlabel(f"test {findings.measure} after retraining")
    return figure


def _alt(findings: Findings) -> str:
    rows = (
        f"{arm_style(arm.name).label} {number(arm.retrained.mean)} {between(arm.retrained)}".strip()
        for arm in findings.arms
    )
    return f"Test {findings.measure} after retraining, best first: {'; '.join(rows)}."


FIGURE = Drawing(
    name="final",
    section="final",
    caption="Test value after retraining what each search chose: mean, its 95 % bootstrap interval "
    "and, below it, every seed.",
    alt=_alt,
    draw=_draw,
)
