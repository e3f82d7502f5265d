"""What the best so far is worth on test, after retraining, against the cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from ift_tune.compare.findings import Curve, Findings
from ift_tune.report.figures.base import Drawing
from ift_tune.report.figures.curves import draw_over_cost, ends


def _curves(findings: Findings) -> dict[str, Curve]:
    return {arm.name: arm.retrained_curve for arm in findings.arms}


def _draw(findings: Findings) -> Figure | None:
    label = f"test {findings.measure} after retraining"
    return draw_over_cost(findings, _curves(findings), label)


FIGURE = Drawing(
    name="anytime-test",
    section="anytime",
    caption="What the best so far is worth: its test value after retraining from scratch. No "
    "search sees it, so it may rise.",
    alt=lambda findings: (
        f"Line chart of the test {findings.measure} after retraining what was best so far, "
        f"against the cost. At the end: {ends(_curves(findings))}."
    ),
    draw=_draw,
)
