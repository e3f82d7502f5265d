"""How the linear solves of the hypergradients ended, along the outer steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ift_tune.base.status import SolveStatus
from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, panels
from ift_tune.report.figures.hypergradients import binned, outer_steps
from ift_tune.report.palette import INK, arm_style
from ift_tune.report.wording import percent

# From good to bad; the hatches tell them apart without colour.
_LOOKS = {
    SolveStatus.CONVERGED: ("#3f9a6b", ""),
    SolveStatus.TRUNCATED: ("#7fa8d1", "//"),
    SolveStatus.NEGATIVE_CURVATURE: ("#d9a437", ".."),
    SolveStatus.SINGULAR: ("#9a7fc0", "xx"),
    SolveStatus.DIVERGED: ("#d1495b", "\\\\"),
    SolveStatus.NONFINITE: ("#6d6f73", "++"),
}


def _draw(findings: Findings) -> Figure | None:
    arms = outer_steps(findings)
    if not arms:
        return None
    figure, grid = panels(len(arms), columns=1, width=4.7, height=2.1)
    legend: dict[str, Any] = {}
    for axes, (name, steps) in zip(grid, arms.items(), strict=True):
        _panel(axes, _shares(steps))
        axes.set(title=arm_style(name).label, ylabel="share of steps", ylim=(0.0, 1.0))
        handles, labels = axes.get_legend_handles_labels()
        legend |= zip(labels, handles, strict=True)
    grid[-1].set_xlabel("outer step")
    seen = [label for label in map(_label, _LOOKS) if label in legend]
    entries = [legend[label] for label in seen]
    figure.legend(entries, seen, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, shares: pd.DataFrame) -> None:
    """Stack the shares, from good to bad."""
    middles = shares.index.to_numpy(dtype=float)
    width = middles[1] - middles[0] if len(middles) > 1 else 1.0
    edges = np.append(middles - width / 2, middles[-1] + width / 2)
    bottom = np.zeros(len(middles))
    for status, (color, hatch) in _LOOKS.items():
        if status.value not in shares:
            continue
        top = bottom + shares[status.value].to_numpy(dtype=float)
        axes.stairs(
            top,
            edges,
            baseline=bottom,
            fill=True,
            linewidth=0.0,
            facecolor=color,
            edgecolor=INK,
            hatch=hatch,
            label=_label(status),
        )
        bottom = top


def _label(status: SolveStatus) -> str:
    return status.value.replace("_", " ")


def _shares(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the share of each status (columns) in each bin of outer steps (rows)."""
    return pd.crosstab(binned(steps["step"]), steps["solve_status"], normalize="index")


def _alt(findings: Findings) -> str:
    texts = []
    for name, steps in outer_steps(findings).items():
        shares = steps["solve_status"].value_counts(normalize=True)
        listed = ", ".join(f"{str(k).replace('_', ' ')} {percent(v)}" for k, v in shares.items())
        texts.append(f"{arm_style(name).label}: {listed}")
    return f"How the linear solves ended, as shares of all outer steps. {'; '.join(texts)}."


FIGURE = Drawing(
    name="solve-status",
    section="health",
    caption="How the linear solve of each hypergradient ended, over all trials and seeds.",
    alt=_alt,
    draw=_draw,
)
