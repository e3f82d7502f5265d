"""The best search value so far against the cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from ift_tune.compare.findings import Curve, Findings
from ift_tune.report.figures.base import Drawing
from ift_tune.report.figures.curves import draw_over_cost, ends
from ift_tune.report.wording import metric_name


def _curves(findings: Findings) -> dict[str, Curve]:
    return {arm.name: arm.search_curve for arm in findings.arms}


def _draw(findings: Findings) -> Figure | None:
    label = f"best {metric_name(findings.metric)} so far"
    return draw_over_cost(findings, _curves(findings), label)


FIGURE = Drawing(
    name="anytime-search",
    section="anytime",
    caption="Best value on the search split so far, by which each search chooses: mean over seeds "
    "with its 95 % bootstrap band. A line begins where every seed has found something.",
    alt=lambda findings: (
        f"Line chart of the best {metric_name(findings.metric)} so far against the cost. At the "
        f"end: {ends(_curves(findings))}."
    ),
    draw=_draw,
)
