"""How the linear solves of the hypergradients ended, along the outer steps."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, panels
from ift_tune.report.figures.hypergradients import binned, outer_steps
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import percent
from ift_tune.types import Status

# From good to bad; the hatches tell them apart without colour.
_LOOKS = {
    Status.CONVERGED: ("#3f9a6b", ""),
    Status.TRUNCATED: ("#7fa8d1", "//"),
    Status.NEGATIVE_CURVATURE: ("#d9a437", ".."),
    Status.SINGULAR: ("#9a7fc0", "xx"),
    Status.DIVERGED: ("#d1495b", "\\\\"),
    Status.NONFINITE: ("#6d6f73", "++"),
}


def _draw(findings: Findings) -> Figure | None:
    arms = outer_steps(findings)
    if not arms:
        return None
    figure, grid = panels(len(arms), columns=1, width=5.4, height=2.4)
    seen: list[Status] = []
    for axes, (name, steps) in zip(grid, arms.items(), strict=True):
        shares = _shares(steps)
        ends = [status for status in _LOOKS if status.value in shares]
        seen += [status for status in ends if status not in seen]
        width = shares.index[1] - shares.index[0] if len(shares) > 1 else 1.0
        bottom = pd.Series(0.0, index=shares.index)
        for status in ends:
            color, hatch = _LOOKS[status]
            label = status.value.replace("_", " ")
            height = shares[status.value]
            look = {"color": color, "hatch": hatch, "edgecolor": "none", "label": label}
            axes.bar(shares.index, height, width, bottom, linewidth=0.0, **look)
            bottom += height
        axes.set(title=arm_style(name).label, ylabel="share of steps", ylim=(0.0, 1.0))
    grid[-1].set_xlabel("outer step")
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [s.value.replace("_", " ") for s in _LOOKS if s in seen]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


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
