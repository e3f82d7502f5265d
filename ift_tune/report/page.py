"""The page: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ift_tune.base.direction import Direction
from ift_tune.base.statistics import LEVEL
from ift_tune.compare.findings import Findings
from ift_tune.compare.verdict import ComparisonVerdict, capitalise, format_count
from ift_tune.report.drawing import SECTIONS, Drawing, inline
from ift_tune.report.html import environment, without_paths
from ift_tune.report.summary import Summary
from ift_tune.report.words import (
    ArmStyle,
    arm_style,
    cost_name,
    format_amount,
    gap_sentences,
    health_sentences,
    learned_sentences,
    metric_name,
    search_sentences,
)

EMBEDDED_BYTES = 500_000
"""Largest file that the page holds; it links to larger ones, in parquet."""

_DOWNLOADS = {
    "trials": "every trial of every search",
    "steps": "every outer step",
    "final": "what each arm found",
    "chosen": "what each search chose",
    "against": "the comparisons",
}


@dataclass(frozen=True)
class PageFigure:
    """A figure as the page shows it.

    Attributes:
        drawing: Which of `figures.FIGURES` it is.
        alt: What it shows, in words.
        svg: The file.
    """

    drawing: Drawing
    alt: str
    svg: bytes

    @property
    def element(self) -> Markup:
        """The figure as an element; user texts in it are escaped by Matplotlib."""
        return Markup(inline(self.svg, name=self.drawing.name, alt=self.alt))


def page(
    findings: Findings,
    verdict: ComparisonVerdict,
    summary: Summary,
    figures: Sequence[PageFigure],
    csv: Mapping[str, bytes],
) -> str:
    """Return the page.

    Args:
        findings: What was found.
        verdict: What it comes to.
        summary: Its tables.
        figures: In the order in which they are shown.
        csv: Tables by name, for download.
    """
    templates = environment()
    templates.filters["key"] = _key
    claim, evidence = _split(verdict.headline)
    return templates.get_template("report.html").render(
        task=without_paths(findings.task),
        claim=claim,
        evidence=evidence,
        verdict=verdict,
        subtitle=_subtitle(findings),
        figures={s: [f for f in figures if f.drawing.section == s] for s in SECTIONS},
        summary=summary,
        gap=gap_sentences(findings),
        learned=learned_sentences(findings),
        health=health_sentences(findings),
        search=search_sentences(findings),
        method=_method(findings),
        downloads=[link(name, csv[name]) for name in _DOWNLOADS if name in csv],
        arm_style=arm_style,
    )


def _split(headline: str) -> tuple[str, str]:
    """Return the claim, for the large letters, and what it rests on."""
    claim, evidence = re.match(r"(.+?)(?:[.:] (.*))?$", headline, re.DOTALL).groups("")  # type: ignore[union-attr]
    return claim.removesuffix(".") + ".", capitalise(evidence)


def _subtitle(findings: Findings) -> str:
    most = max(arm.seeds for arm in findings.arms)
    return (
        f"{format_count(len(findings.arms), 'arm')}, up to {format_count(most, 'seed')} each, a "
        f"budget of {format_amount(findings.limit)} {cost_name(findings)} for each search"
    )


def _method(findings: Findings) -> dict[str, Any]:
    """Return the settings that the method's description names."""
    run = findings.about["run"]
    return {
        "cost": cost_name(findings),
        "limit": format_amount(findings.limit),
        "counted": findings.cost == "gradient_equivalents",
        "metric": metric_name(findings.metric),
        "measure": findings.measure,
        "better": capitalise(findings.direction.words),
        "ranks": "ranks too" if findings.direction is Direction.MIN else "but lower ranks",
        "training_steps": run.get("training_steps"),
        "config": run.get("config") or {},
        "level": f"{LEVEL:g}",
        "fewest": min(arm.seeds for arm in findings.arms),
    }


def link(name: str, csv: bytes) -> dict[str, str]:
    """Return a table's link: with the table in it, or, of a large one, to its parquet file."""
    about = _DOWNLOADS[name]
    if len(csv) > EMBEDDED_BYTES:
        file = f"{name}.parquet"
        return {"file": file, "about": about, "size": "beside this page", "href": file}
    size = f"{max(1, round(len(csv) / 1000)):,} kB"
    href = f"data:text/csv;charset=utf-8;base64,{base64.b64encode(csv).decode()}"
    return {"file": f"{name}.csv", "about": about, "size": size, "href": href}


def _key(style: ArmStyle) -> Markup:
    """Return a piece of the arm's line, as in the figures."""
    dashes = " ".join(f"{2.0 * length:g}" for length in style.dashes)
    return Markup(
        '<svg class="key" viewBox="0 0 34 10" aria-hidden="true">'
        '<line x1="1" y1="5" x2="33" y2="5" '
        'stroke="{}" stroke-width="3" stroke-dasharray="{}"/></svg>'
    ).format(style.color, dashes)
