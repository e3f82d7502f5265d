"""How much better a choice looked than it is."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, best_first, one_panel
from ift_tune.report.palette import INK, arm_style
from ift_tune.report.wording import number


def _draw(findings: Findings) -> Figure | None:
    arms = findings.arms
    figure, axes = one_panel(height=1.5 + 0.42 * len(arms))
    heights = best_first(axes, [arm_style(arm.name).label for arm in arms])
    for arm, height in zip(arms, heights, strict=True):
        color = arm_style(arm.name).color
        chosen = findings.chosen[findings.chosen["arm"] == arm.name]
        pairs = (
            (0.14, "o", color, chosen["retrained"] - chosen["search"]),
            (-0.14, "s", "none", chosen["test"] - chosen["val"]),
        )
        for shift, marker, face, gaps in pairs:
            _row(figure, gaps.dropna(), height + shift, marker, color, face)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    for marker, face, label in (
        ("o", INK, "test after retraining − search"),
        ("s", "none", "test − validation, at the weights of the choice"),
    ):
        axes.plot(
            [], [], marker, markerfacecolor=face, markeredgecolor=INK, markersize=6, label=label
        )
    axes.set_xlabel(f"difference of {findings.measure}")
    figure.legend(loc="outside upper left", frameon=False, ncols=1)
    return figure


def _row(
    figure: Figure, gaps: pd.Series[float], height: float, marker: str, color: str, face: str
) -> None:
    """Draw each seed faintly and the mean over them."""
    if gaps.empty:
        return
    (axes,) = figure.axes
    look: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": color}
    axes.plot(gaps, [height] * len(gaps), marker, markersize=3, alpha=0.5, **look)
    axes.plot([gaps.mean()], [height], marker, markersize=7, markeredgewidth=1.5, **look)


def _alt(findings: Findings) -> str:
    rows = []
    for arm in findings.arms:
        text = f"{arm_style(arm.name).label} {number(arm.optimism)}"
        if math.isfinite(arm.val_test_gap):
            text += f" (test minus validation {number(arm.val_test_gap)})"
        rows.append(text)
    return (
        f"Test {findings.measure} after retraining minus the search value by which it was chosen, "
        f"mean over seeds: {'; '.join(rows)}."
    )


FIGURE = Drawing(
    name="gap",
    section="gap",
    caption="Right of 0 the choice looked better than it is. Large marks are means over seeds, "
    "small ones single seeds. Arms that train nothing on the validation split have no square.",
    alt=_alt,
    draw=_draw,
)
