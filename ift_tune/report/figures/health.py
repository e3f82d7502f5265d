"""Whether the hypergradients are to be trusted: how their linear solves went, by outer step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ift_tune.base.status import SolveStatus
from ift_tune.compare.findings import Findings
from ift_tune.report.drawing import INK, Drawing, Drawn, panels, spread_axis
from ift_tune.report.words import (
    arm_label,
    arm_style,
    format_number,
    format_share,
    status_name,
    status_shares,
)

_BINS = 40  # along the outer steps

# From good to bad; the hatches tell them apart without colour.
_LOOKS = {
    SolveStatus.CONVERGED: ("#3f9a6b", ""),
    SolveStatus.TRUNCATED: ("#7fa8d1", "//"),
    SolveStatus.NEGATIVE_CURVATURE: ("#d9a437", ".."),
    SolveStatus.SINGULAR: ("#9a7fc0", "xx"),
    SolveStatus.DIVERGED: ("#d1495b", "\\\\"),
    SolveStatus.NONFINITE: ("#6d6f73", "++"),
}

_SHARE = "negative_curvature"  # 0 or 1 at each step
_COLUMNS = {
    "alpha_lambda_max": "α·λ_max",
    "relative_residual": "relative residual",
    _SHARE: "negative curvature, share",
}
# Above which the series diverges: Σ (1 − αλ)ᵏ is geometric, with a ratio below −1 if αλ > 2.
_LIMITS = {"alpha_lambda_max": 2.0, "relative_residual": 1.0}


def _statuses(findings: Findings) -> Drawn | None:
    arms = findings.outer_steps
    if not arms:
        return None
    figure, grid = panels(len(arms), columns=1, width=4.7, height=2.1)
    legend: dict[str, Any] = {}
    texts = []
    for axes, (name, steps) in zip(grid, arms.items(), strict=True):
        _status_panel(axes, steps)
        axes.set(title=arm_label(name), ylabel="share of steps", ylim=(0.0, 1.0))
        handles, labels = axes.get_legend_handles_labels()
        legend |= zip(labels, handles, strict=True)
        shares = status_shares(steps).items()
        listed = ", ".join(f"{status_name(str(k))} {format_share(v)}" for k, v in shares)
        texts.append(f"{arm_label(name)}: {listed}")
    grid[-1].set_xlabel("outer step")
    seen = [label for status in _LOOKS if (label := status_name(status.value)) in legend]
    entries = [legend[label] for label in seen]
    figure.legend(entries, seen, loc="outside lower center", ncols=3, frameon=False)
    alt = f"How the linear solves ended, as shares of all outer steps. {'; '.join(texts)}."
    return Drawn(figure, alt)


def _status_panel(axes: Axes, steps: pd.DataFrame) -> None:
    """Stack the share of each status in each bin of outer steps, from good to bad."""
    shares = pd.crosstab(_binned(steps["step"]), steps["solve_status"], normalize="index")
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
            label=status_name(status.value),
        )
        bottom = top


def _numbers(findings: Findings) -> Drawn | None:
    measured = {
        column: {
            name: steps.dropna(subset=[column])
            for name, steps in findings.outer_steps.items()
            if column in steps and steps[column].notna().any()
        }
        for column in _COLUMNS
    }
    measured = {column: arms for column, arms in measured.items() if arms}
    if not measured:
        return None
    figure, grid = panels(len(measured), columns=1, width=4.7, height=1.9)
    for axes, (column, arms) in zip(grid, measured.items(), strict=True):
        _number_panel(axes, column, arms)
    grid[-1].set_xlabel("outer step")
    grid[0].legend(frameon=False, handlelength=3.6, ncols=2)
    texts = [
        f"{_COLUMNS[column]} of {arm_label(name)}: "
        f"median {format_number(float(steps[column].median()))}, "
        f"largest {format_number(float(steps[column].max()))}"
        for column, arms in measured.items()
        for name, steps in arms.items()
    ]
    alt = f"Health of the hypergradients against the outer step. {'; '.join(texts)}."
    return Drawn(figure, alt)


def _number_panel(axes: Axes, column: str, arms: dict[str, pd.DataFrame]) -> None:
    drawn = []
    for place, (name, steps) in enumerate(arms.items()):
        style = arm_style(name)
        groups = steps[column].astype(float).groupby(_binned(steps["step"]))
        # What is 0 or 1 at each step has no meaningful quartiles: its mean is a share.
        middle = groups.mean() if column == _SHARE else groups.median()
        axes.plot(middle, linewidth=1.6, markevery=(place, 6), **style.line)
        if column != _SHARE:
            low, high = groups.quantile(0.25), groups.quantile(0.75)
            at = np.asarray(middle.index, dtype=float)
            axes.fill_between(at, low, high, color=style.color, alpha=0.15, linewidth=0)
        drawn.append(middle.to_numpy(dtype=float))
    values = np.concatenate(drawn, dtype=np.float64)
    spread_axis(axes, "y", values)
    if column in _LIMITS and values.max() > 0.5 * _LIMITS[column]:
        axes.axhline(_LIMITS[column], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    if column == _SHARE:
        axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(_COLUMNS[column])


def _binned(step: pd.Series[int]) -> pd.Series[float]:
    """Return for each row the middle of its bin of outer steps; few steps are bins of their own."""
    last = int(step.max())
    width = -(-last // _BINS)
    return ((step.astype(int) - 1) // width * width + (width + 1) / 2).astype(float)


FIGURES = (
    Drawing(
        name="solve-status",
        section="health",
        caption="How the linear solve of each hypergradient ended, over all trials and seeds.",
        draw=_statuses,
    ),
    Drawing(
        name="solve-health",
        section="health",
        caption="Medians over trials and seeds with the middle half as a band (shares without "
        "one). Dotted: the series diverges above it. α·λ_max is Neumann's alone.",
        draw=_numbers,
    ),
)
