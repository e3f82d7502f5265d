"""What the hyperparameters of IFT have become."""

from __future__ import annotations

from matplotlib.figure import Figure

from ift_tune.base.views import View, unpack
from ift_tune.compare.findings import Findings
from ift_tune.report.figures.base import Drawing
from ift_tune.report.views import compose
from ift_tune.trial.tables import VIEWS


def _views(findings: Findings) -> list[View]:
    return unpack(findings.about.get(VIEWS, "[]"))


def _draw(findings: Findings) -> Figure | None:
    views = _views(findings)
    return compose(views) if views else None


def _alt(findings: Findings) -> str:
    return (
        f"Pictures of the learned hyperparameters: {', '.join(v.title for v in _views(findings))}."
    )


FIGURE = Drawing(
    name="learned",
    section="learned",
    caption="The hyperparameters that the first search of IFT chose.",
    alt=_alt,
    draw=_draw,
)
