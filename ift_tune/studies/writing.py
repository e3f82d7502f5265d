"""Writing a study: its tables, its sentences, and what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pandas as pd

from ift_tune.base.files import write_atomically, write_table


class Verdict(Enum):
    """How a claim came out here."""

    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    MIXED = "mixed"
    """It holds in some places and fails in others."""
    UNDECIDED = "undecided"
    """The data do not tell: the difference is within its noise, or there was nothing to compare."""
    NOTE = "note"
    """No claim: something to be known when reading the others."""


@dataclass(frozen=True)
class Finding:
    """A sentence with its verdict.

    Attributes:
        claim: What was asked, a short key for tables and programs.
        verdict: How it came out.
        sentence: For readers; it has the figures that decide.
    """

    claim: str
    verdict: Verdict
    sentence: str

    def __str__(self) -> str:
        """Return the sentence, with the verdict where there is one."""
        if self.verdict is Verdict.NOTE:
            return self.sentence
        return f"{self.sentence}: {self.verdict.value}."


def tallied(holds: int, total: int) -> Verdict:
    """Return the verdict of a claim that held at `holds` of `total` places."""
    if total == 0:
        return Verdict.UNDECIDED
    if holds == total:
        return Verdict.CONFIRMED
    return Verdict.CONTRADICTED if holds == 0 else Verdict.MIXED


def decided(low: float, high: float) -> Verdict:
    """Return the verdict of "the difference is above 0" from the ends of its interval."""
    if low > 0.0:
        return Verdict.CONFIRMED
    return Verdict.CONTRADICTED if high < 0.0 else Verdict.UNDECIDED


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        title: One line.
        about: What was measured and how, in a few sentences of Markdown.
        tables: By file name, the main one first.
        findings: Sentences computed from the tables.
    """

    title: str
    about: str
    tables: Mapping[str, pd.DataFrame]
    findings: Sequence[Finding]

    def facts(self) -> dict[str, Any]:
        """Return plain values, for programs that read what the command line prints."""
        return {
            "findings": [
                {"claim": f.claim, "verdict": f.verdict.value, "sentence": f.sentence}
                for f in self.findings
            ]
        }


def write_study(directory: Path, study: Study, figures: Sequence[Path] = ()) -> list[Path]:
    """Write tables as CSV and parquet, and README.md with the sentences and figures.

    Returns:
        The files, README.md first.
    """
    files = [directory / "README.md"]
    for name, table in study.tables.items():
        write_table(directory / name, table)
        files += [directory / f"{name}.csv", directory / f"{name}.parquet"]
    write_atomically(files[0], _readme(study, figures).encode())
    return files


def _readme(study: Study, figures: Sequence[Path]) -> str:
    sentences = "\n".join(f"- {finding}" for finding in study.findings)
    pictures = "\n\n".join(
        f"![{path.stem}]({path.name})" for path in figures if path.suffix == ".png"
    )
    tables = ", ".join(f"`{name}.csv`" for name in study.tables)
    end = f"Tables: {tables} (and .parquet); settings and machine: `run.json`, `environment.json`."
    parts = [f"# {study.title}", study.about, "## Findings", sentences, pictures, end]
    return "\n\n".join(part for part in parts if part) + "\n"
