"""The findings in plain sentences, "no evidence" among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ift_tune.compare.findings import REFERENCES, Against, Findings
from ift_tune.compare.statistics import LEVEL, least_p, pairs_needed

FIRST = "random"
"""The arm that the headline is about, where it is there."""

_OPENINGS = (
    "IFT is not worth it here.",
    "Whether IFT is worth it here is not shown.",
    "IFT is worth it here.",
)
_NAMES = {
    "ift": "IFT",
    "ift+tpe": "IFT with an outer search by TPE",
    "random": "random search",
    "random+val": "random search that trains on the validation examples too",
    "tpe": "TPE",
    "gp": "the Gaussian process",
    "cmaes": "CMA-ES",
    "grid": "grid search",
    "asha": "successive halving",
    "none": "no search",
}


@dataclass(frozen=True)
class Verdict:
    """What a comparison comes to.

    Attributes:
        headline: Whether IFT is worth it here, in a sentence.
        others: A sentence about each further arm.
        notes: What limits the answer: too few seeds, unfinished searches.
    """

    headline: str
    others: list[str]
    notes: list[str]


def judge(findings: Findings) -> Verdict:
    """Return the verdict: on the arm `FIRST` if it is there, else on the best other arm."""
    reference = spoken(findings.reference)
    order = sorted(findings.against, key=lambda a: a.other != FIRST)
    if not order:
        arm = findings.arm(findings.reference)
        only = f"{capital(reference)} alone was run: test {findings.measure} after retraining "
        headline = f"{only}{arm.retrained.mean:.4g}; there is nothing to compare it with."
        return Verdict(headline, [], _notes(findings))
    headline = _sentence(findings, order[0], headline=True)
    others = [_sentence(findings, against) for against in order[1:]]
    return Verdict(headline, others, _notes(findings))


def conclusion(against: Against) -> int:
    """Return 1 if the reference is better, −1 if the other arm is, 0 if there is no evidence.

    Evidence takes both: a permutation test below `LEVEL` after Holm's correction, and a bootstrap
    interval that is clear of 0.
    """
    low, high = against.test.difference.low, against.test.difference.high
    clear = low > 0.0 or high < 0.0
    if not clear or against.p_holm >= LEVEL:
        return 0
    return 1 if low > 0.0 else -1


def spoken(arm: str) -> str:
    """Return an arm's name in a sentence."""
    return _NAMES.get(arm, arm)


def capital(text: str) -> str:
    """Return the text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def _sentence(findings: Findings, against: Against, *, headline: bool = False) -> str:
    verdict = conclusion(against)
    reference, other = spoken(findings.reference), spoken(against.other)
    if not against.test.pairs:
        return f"{capital(reference)} and {other} have no seed in common yet."
    ours = findings.arm(findings.reference).retrained.mean
    theirs = findings.arm(against.other).retrained.mean
    claim = (
        f"{capital(other)} is better than {reference}",
        f"No evidence that {reference} and {other} differ",
        f"{capital(reference)} is better than {other}",
    )[verdict + 1]
    if headline and findings.reference in REFERENCES:
        claim = f"{_OPENINGS[verdict + 1]} {claim}"
    return (
        f"{claim}: test {findings.measure} after retraining {ours:.4g} against {theirs:.4g} "
        f"({_evidence(against)})."
    )


def _evidence(against: Against) -> str:
    """Return the difference with its interval and its test."""
    test = against.test
    d = test.difference
    between = f", 95 % interval {-d.high:.4g} to {-d.low:.4g}" if math.isfinite(d.low) else ""
    return (
        f"difference {-d.mean:.4g}{between}; lower in {test.wins} of {test.pairs} seeds; "
        f"p = {against.p_holm:.2g} with Holm's correction"
    )


def _notes(findings: Findings) -> list[str]:
    notes = []
    needed = pairs_needed(len(findings.against))
    fewest = min((a.test.pairs for a in findings.against), default=needed)
    if fewest < needed:
        notes.append(
            f"Too few seeds: with {fewest} pairs the test cannot go below p = {least_p(fewest):.4g}"
            f", and {len(findings.against)} comparison{'s' * (len(findings.against) != 1)} at the "
            f"level {LEVEL:g} take at least {needed} seeds, however large the difference."
        )
    extent = findings.about["run"]["extent"]
    wanted = len(extent["arms"]) * len(extent["seeds"])
    if wanted > len(findings.chosen):
        notes.append(
            f"{wanted - len(findings.chosen)} of {wanted} searches have not found anything yet: "
            "the comparison is unfinished, or they failed (see stop_reason in the tables)."
        )
    return notes
