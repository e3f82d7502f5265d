"""The numbers that tell whether a hypergradient is to be trusted, along the outer steps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, panels, spread_axis
from ift_tune.report.figures.hypergradients import binned, outer_steps
from ift_tune.report.palette import INK, arm_style
from ift_tune.report.wording import number

_COLUMNS = {
    "alpha_lambda_max": "α·λ_max",
    "relative_residual": "relative residual",
    "negative_curvature": "negative curvature, share",
}
_LIMITS = {"alpha_lambda_max": 2.0, "relative_residual": 1.0}  # above which the series diverges


def _measured(findings: Findings) -> dict[str, dict[str, pd.DataFrame]]:
    """Return by column and arm the rows that have it."""
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for column in _COLUMNS:
        for name, steps in outer_steps(findings).items():
            if column in steps and steps[column].notna().any():
                found.setdefault(column, {})[name] = steps.dropna(subset=[column])
    return found


def _draw(findings: Findings) -> Figure | None:
    measured = _measured(findings)
    if not measured:
        return None
    figure, grid = panels(len(measured), columns=1, width=4.7, height=1.9)
    for axes, (column, arms) in zip(grid, measured.items(), strict=True):
        _panel(axes, column, arms)
    grid[-1].set_xlabel("outer step")
    grid[0].legend(frameon=False, handlelength=3.6, ncols=2)
    return figure


def _panel(axes: Axes, column: str, arms: dict[str, pd.DataFrame]) -> None:
    drawn = []
    for place, (name, steps) in enumerate(arms.items()):
        style = arm_style(name)
        groups = steps[column].astype(float).groupby(binned(steps["step"]))
        # A share has no meaningful quartiles: it is 0 or 1 at each step.
        share = column == "negative_curvature"
        middle = groups.mean() if share else groups.median()
        axes.plot(middle, linewidth=1.6, markevery=(place, 6), **style.line)
        if not share:
            low, high = groups.quantile(0.25), groups.quantile(0.75)
            at = np.asarray(middle.index, dtype=float)
            axes.fill_between(at, low, high, color=style.color, alpha=0.15, linewidth=0)
        drawn.append(middle.to_numpy(dtype=float))
    values = np.concatenate(drawn, dtype=np.float64)
    spread_axis(axes, "y", values)
    if column in _LIMITS and values.max() > 0.5 * _LIMITS[column]:
        axes.axhline(_LIMITS[column], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    if column == "negative_curvature":
        axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(_COLUMNS[column])


def _alt(findings: Findings) -> str:
    texts = [
        f"{label} of {arm_style(name).label}: median {number(float(steps[column].median()))}, "
        f"largest {number(float(steps[column].max()))}"
        for column, label in _COLUMNS.items()
        for name, steps in _measured(findings).get(column, {}).items()
    ]
    return f"Health of the hypergradients against the outer step. {'; '.join(texts)}."


FIGURE = Drawing(
    name="solve-health",
    section="health",
    caption="Medians over trials and seeds with the middle half as a band (shares without one). "
    "Dotted: the series diverges above it. α·λ_max is Neumann's alone.",
    alt=_alt,
    draw=_draw,
)
