"""One sentence that a study computed from its tables, and how it came out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
