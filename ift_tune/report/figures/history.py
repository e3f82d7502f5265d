"""The value of each trial, and the best so far, of the arms that search."""

from __future__ import annotations

from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, panels, spread_axis, whole_axis
from ift_tune.report.figures.searches import searching
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import metric_name, number


def _draw(findings: Findings) -> Figure | None:
    arms = searching(findings)
    if not arms:
        return None
    figure, grid = panels(len(arms), columns=2, width=3.6, height=2.5)
    for axes, (name, trials) in zip(grid, arms.items(), strict=True):
        style = arm_style(name)
        axes.plot(
            trials["trial"], trials["best_value"], "o", color=style.color, markersize=3, alpha=0.4
        )
        for _, own in trials.groupby("seed"):
            best = own["best_value"].cummin()
            axes.step(own["trial"], best, where="post", color=style.color, linewidth=1.2)
        spread_axis(axes, "y", trials["best_value"].to_numpy(dtype=float))
        whole_axis(axes.xaxis)
        axes.set(title=style.label, xlabel="trial", ylabel=metric_name(findings.metric))
    return figure


def _alt(findings: Findings) -> str:
    texts = [
        f"{arm_style(name).label}: {len(trials)} trials, best {number(trials['best_value'].min())}"
        for name, trials in searching(findings).items()
    ]
    return f"Value of each trial and the best so far of each seed. {'; '.join(texts)}."


FIGURE = Drawing(
    name="history",
    section="search",
    caption="History: a dot a trial, a line a seed for its best so far.",
    alt=_alt,
    draw=_draw,
)
