"""The findings as tables: of texts for readers, in page and Markdown alike, and for programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ift_tune.base.statistics import Interval
from ift_tune.compare.findings import ArmFindings, Findings
from ift_tune.compare.pairwise import Against, Conclusion
from ift_tune.compare.verdict import ComparisonVerdict, capitalise, display_name
from ift_tune.report.html import without_paths
from ift_tune.report.markdown import bullets, code, escaped, table
from ift_tune.report.words import (
    NOTHING,
    aimed_name,
    arm_label,
    format_amount,
    format_mean,
    format_number,
    format_p_value,
    format_reach,
    learned_sentences,
    metric_name,
)

_OUTCOMES = {
    Conclusion.REFERENCE_BETTER: "better",
    Conclusion.NO_EVIDENCE: "open",
    Conclusion.OTHER_BETTER: "worse",
}
_CONCLUSIONS = {
    Conclusion.REFERENCE_BETTER: "reference better",
    Conclusion.NO_EVIDENCE: "no evidence",
    Conclusion.OTHER_BETTER: "other better",
}


@dataclass(frozen=True)
class TextRow:
    """A row of a table for readers.

    Attributes:
        arm: Whose it is.
        cells: Texts, the first is the arm's name.
        note: Under the name.
        outcome: "better", "worse" or "open": for the reference; empty in other tables.
    """

    arm: str
    cells: list[str]
    note: str = ""
    outcome: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table for readers.

    Attributes:
        name: What it is.
        head: Texts over the columns.
        rows: As many cells each.
    """

    name: str
    head: list[str]
    rows: list[TextRow]


@dataclass(frozen=True)
class Summary:
    """What page and Markdown show alike.

    Attributes:
        final: What each arm came to, best first.
        against: The reference against each other arm.
        environment: What the comparison ran on, by name, without paths of the machine.
        commands: The commands that made it, absolute paths cut to their last part.
    """

    final: TextTable
    against: TextTable
    environment: list[tuple[str, str]]
    commands: list[str]


def summarise(findings: Findings) -> Summary:
    """Return what page and Markdown show alike."""
    about = findings.about.get("environment") or {}
    return Summary(_final(findings), _against(findings), _environment(about), _commands(about))


def summary_tables(findings: Findings) -> dict[str, pd.DataFrame]:
    """Return ``final`` (a row an arm), ``chosen`` (a search) and ``against`` (a comparison)."""
    against = [_against_plain(findings.reference, pair) for pair in findings.against]
    return {
        "final": pd.DataFrame([_final_plain(arm) for arm in findings.arms]),
        "chosen": findings.chosen,
        "against": pd.DataFrame(against) if against else pd.DataFrame(columns=["reference"]),
    }


def markdown(findings: Findings, verdict: ComparisonVerdict, summary: Summary) -> str:
    """Return verdict, tables, notes and environment as Markdown."""
    learned = learned_sentences(findings)
    parts = [
        f"# {escaped(without_paths(findings.task))}: comparison",
        f"**{escaped(verdict.headline)}**",
        bullets(verdict.others),
        f"## Notes\n\n{bullets(verdict.notes)}" if verdict.notes else "",
        _text_table(summary.final),
        _text_table(summary.against),
        f"## What was learned\n\n{bullets(learned)}" if learned else "",
        "## Environment and command",
        bullets([f"{name}: {text}" for name, text in summary.environment]),
        code(summary.commands) if summary.commands else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text_table(shown: TextTable) -> str:
    if not shown.rows:
        return ""
    return f"## {shown.name}\n\n{table(shown.head, [row.cells for row in shown.rows])}"


def _final(findings: Findings) -> TextTable:
    head = [
        "arm",
        "seeds",
        f"{aimed_name(findings, f'test {findings.measure} after retraining')} [95 % interval]",
        f"{metric_name(findings.metric)} [95 % interval]",
        "mean rank",
        "trials",
        "cost",
        "seconds",
    ]
    return TextTable("What each arm found", head, [_final_row(arm) for arm in findings.arms])


def _final_row(arm: ArmFindings) -> TextRow:
    cells = [
        arm_label(arm.name),
        str(arm.seeds),
        format_mean(arm.retrained),
        format_mean(arm.search),
        format_number(arm.rank, 3),
        format_number(arm.trials, 3),
        format_amount(arm.cost),
        format_amount(arm.seconds),
    ]
    return TextRow(arm.name, cells, note=arm.summary)


def _final_plain(arm: ArmFindings) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "summary": arm.summary,
        "seeds": arm.seeds,
        **_interval("retrained", arm.retrained),
        **_interval("search", arm.search),
        "mean_rank": arm.rank,
        "trials": arm.trials,
        "cost": arm.cost,
        "seconds": arm.seconds,
        "optimism": arm.optimism,
        "val_test_gap": arm.val_test_gap,
    }


def _against(findings: Findings) -> TextTable:
    reference = arm_label(findings.reference)
    head = [
        f"{reference} against",
        f"difference {reference} − other [95 % interval]",
        "p (Holm)",
        "effect size d",
        f"{findings.direction.comparative} in",
        f"{reference} reaches the other's best {metric_name(findings.metric)}",
        "conclusion",
    ]
    rows = [_against_row(findings.reference, pair) for pair in findings.against]
    return TextTable("Compared pair by pair", head, rows)


def _against_row(reference: str, against: Against) -> TextRow:
    conclusions = {
        Conclusion.REFERENCE_BETTER: f"{capitalise(display_name(reference))} is better",
        Conclusion.NO_EVIDENCE: "no evidence of a difference",
        Conclusion.OTHER_BETTER: f"{capitalise(display_name(against.other))} is better",
    }
    cells = [
        arm_label(against.other),
        format_mean(against.difference),
        format_p_value(against.p_holm),
        format_number(against.test.effect, 3),
        f"{against.test.wins} of {against.test.pairs}",
        format_reach(against.reach),
        conclusions[against.conclusion],
    ]
    return TextRow(against.other, cells, outcome=_OUTCOMES[against.conclusion])


def _against_plain(reference: str, against: Against) -> dict[str, Any]:
    return {
        "reference": reference,
        "other": against.other,
        **_interval("difference", against.difference),
        "p": against.test.p,
        "p_holm": against.p_holm,
        "effect": against.test.effect,
        "wins": against.test.wins,
        "pairs": against.test.pairs,
        "conclusion": _CONCLUSIONS[against.conclusion],
        "cost_ratio": against.reach.ratio,
        "reached": against.reach.reached,
        "reach_seeds": against.reach.seeds,
    }


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _environment(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not about:
        return []
    packages = about.get("packages") or {}
    return [
        ("processor", f"{about.get('cpu', NOTHING)}, {about.get('cpu_count')} cores"),
        ("GPUs", ", ".join(about.get("gpus") or []) or "none"),
        ("threads of PyTorch", str(about.get("torch_threads", NOTHING))),
        ("system", str(about.get("platform", NOTHING))),
        ("Python", str(about.get("python", NOTHING))),
        (
            "packages",
            ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        ),
        ("commit", str(about.get("git_commit") or "not from a checkout")),
    ]


def _commands(about: Mapping[str, Any]) -> list[str]:
    every = [about.get("command") or [], *(about.get("further_commands") or [])]
    lines = [" ".join(without_paths(shlex.quote(part)) for part in command) for command in every]
    return [" ".join(line.split()) for line in lines if line]  # each on one line
