"""The tables that a reader sees, as rows of texts: the page and the Markdown show the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ift_tune.base.statistics import Interval
from ift_tune.compare.against import Against
from ift_tune.compare.findings import ArmFindings, Findings
from ift_tune.compare.verdict import capitalise, display_name
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import (
    NOTHING,
    amount,
    between,
    metric_name,
    number,
    p_value,
    reach,
    without_paths,
)


@dataclass(frozen=True)
class Row:
    """A row of a table.

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
class Table:
    """A table for readers.

    Attributes:
        name: What it is.
        head: Texts over the columns.
        rows: As many cells each.
    """

    name: str
    head: list[str]
    rows: list[Row]


def final_table(findings: Findings) -> Table:
    """Return what each arm came to, best first."""
    head = [
        "arm",
        "seeds",
        f"test {findings.measure} after retraining [95 % interval]",
        f"{metric_name(findings.metric)} [95 % interval]",
        "mean rank",
        "trials",
        "cost",
        "seconds",
    ]
    return Table("What each arm found", head, [_final_row(arm) for arm in findings.arms])


def against_table(findings: Findings) -> Table:
    """Return the reference against each other arm."""
    reference = arm_style(findings.reference).label
    head = [
        f"{reference} against",
        f"difference {reference} − other [95 % interval]",
        "p (Holm)",
        "effect size d",
        "lower in",
        f"{reference} reaches the other's best {metric_name(findings.metric)}",
        "conclusion",
    ]
    rows = [_against_row(findings.reference, found) for found in findings.against]
    return Table("Compared pair by pair", head, rows)


def environment_rows(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the comparison ran on, without paths of the machine."""
    environment = about.get("environment") or {}
    packages = environment.get("packages") or {}
    commit, gpus = environment.get("git_commit"), environment.get("gpus") or []
    rows = [
        ("processor", f"{environment.get('cpu', NOTHING)}, {environment.get('cpu_count')} cores"),
        ("GPUs", ", ".join(gpus) or "none"),
        ("threads of PyTorch", str(environment.get("torch_threads", NOTHING))),
        ("system", str(environment.get("platform", NOTHING))),
        ("Python", str(environment.get("python", NOTHING))),
        (
            "packages",
            ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        ),
        ("commit", str(commit or "not from a checkout")),
    ]
    return rows if environment else []


def commands(about: Mapping[str, Any]) -> list[str]:
    """Return the commands that made the comparison, absolute paths cut to their last part."""
    environment = about.get("environment") or {}
    every = [environment.get("command") or [], *(environment.get("further_commands") or [])]
    lines = [" ".join(without_paths(shlex.quote(part)) for part in command) for command in every]
    return [" ".join(line.split()) for line in lines if line]  # each on one line


def _final_row(arm: ArmFindings) -> Row:
    cells = [
        arm_style(arm.name).label,
        str(arm.seeds),
        _with_interval(arm.retrained),
        _with_interval(arm.search),
        number(arm.rank, 3),
        number(arm.trials, 3),
        amount(arm.cost),
        amount(arm.seconds),
    ]
    return Row(arm.name, cells, note=arm.summary)


def _against_row(reference: str, found: Against) -> Row:
    test, verdict = found.test, found.conclusion
    d = test.difference
    cells = [
        arm_style(found.other).label,
        _with_interval(Interval(-d.mean, -d.high, -d.low)),
        p_value(found.p_holm),
        number(test.effect, 3),
        f"{test.wins} of {test.pairs}",
        reach(found.reach),
        {
            1: f"{capitalise(display_name(reference))} is better",
            0: "no evidence of a difference",
            -1: f"{capitalise(display_name(found.other))} is better",
        }[verdict],
    ]
    return Row(found.other, cells, outcome=("open", "better", "worse")[verdict])


def _with_interval(interval: Interval) -> str:
    return f"{number(interval.mean)} {between(interval)}".strip()
