"""How much each searched parameter mattered, as Optuna estimates it."""

from __future__ import annotations

from matplotlib.figure import Figure

from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing, best_first, panels
from ift_tune.report.figures.searches import complete, searched, searching
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import parameter_name, percent
from ift_tune.search.analysis import parameter_importances


def _importances(findings: Findings) -> dict[str, dict[str, float]]:
    """Return by arm the share of each parameter, the largest first."""
    return {
        name: shares
        for name, trials in searching(findings).items()
        if (shares := parameter_importances(complete(trials), "best_value", searched(trials)))
    }


def _draw(findings: Findings) -> Figure | None:
    arms = _importances(findings)
    if not arms:
        return None
    figure, grid = panels(len(arms), columns=2, width=3.6, height=1.8)
    for axes, (name, shares) in zip(grid, arms.items(), strict=True):
        style = arm_style(name)
        heights = best_first(axes, [parameter_name(p) for p in shares])
        axes.barh(heights, list(shares.values()), height=0.55, color=style.color, alpha=0.85)
        axes.set(title=style.label, xlabel="share of importance", xlim=(0.0, 1.0))
    return figure


def _alt(findings: Findings) -> str:
    texts = [
        f"{arm_style(name).label}: "
        + ", ".join(f"{parameter_name(p)} {percent(share)}" for p, share in shares.items())
        for name, shares in _importances(findings).items()
    ]
    return f"Importance of the searched parameters. {'; '.join(texts)}."


FIGURE = Drawing(
    name="importance",
    section="search",
    caption="Importance of each parameter, by Optuna's fANOVA over the complete trials of all "
    "seeds: the share of the variation of the value that it explains.",
    alt=_alt,
    draw=_draw,
)
