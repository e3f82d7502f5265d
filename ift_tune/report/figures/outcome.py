"""What each arm came to: on test, against what its choice promised, and in pictures."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from ift_tune.base.views import unpack
from ift_tune.compare.findings import ArmFindings, Findings
from ift_tune.report.drawing import Drawing, Drawn, best_first, one_panel
from ift_tune.report.runs import compose
from ift_tune.report.words import INK, arm_label, arm_style, format_mean, format_number
from ift_tune.trial.tables import VIEWS


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
    axes.set_xlabel(f"test {findings.measure} after retraining")
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
        _gap_row(axes, chosen["retrained"] - chosen["search"], height + 0.14, "o", color, color)
        _gap_row(axes, chosen["test"] - chosen["val"], height - 0.14, "s", color, "none")
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
    alt = (
        f"Test {findings.measure} after retraining minus the search value by which it was chosen, "
        f"mean over seeds: {'; '.join(_gap_text(arm) for arm in arms)}."
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


def _gap_text(arm: ArmFindings) -> str:
    text = f"{arm_label(arm.name)} {format_number(arm.optimism)}"
    if math.isfinite(arm.val_test_gap):
        text += f" (test minus validation {format_number(arm.val_test_gap)})"
    return text


def _learned(findings: Findings) -> Drawn | None:
    views = unpack(findings.about.get(VIEWS, "[]"))
    if not views:
        return None
    titles = ", ".join(view.title for view in views)
    return Drawn(compose(views), f"Pictures of the learned hyperparameters: {titles}.")


FIGURES = (
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
