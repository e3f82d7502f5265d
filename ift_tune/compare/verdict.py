"""The findings in plain sentences, "no evidence" among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ift_tune.base.statistics import LEVEL, least_p, pairs_needed
from ift_tune.compare.arms import ARMS
from ift_tune.compare.findings import REFERENCES, Findings
from ift_tune.compare.pairwise import Against, Conclusion
from ift_tune.trial.diagnoses import DIAGNOSES, counted

FIRST = "random"
"""The arm that is spoken of first, where it is there."""

RIVALS = ("val", "random+val")
"""Arms without which nobody knows whether IFT is worth it: the simplest uses of its examples."""

RIVALS_OF_KINDS = {
    "example weights": ("loss-ranking",),
    "domain weights": ("proportional", "uniform"),
}
"""Those that are needed too where λ has some kind, by how that kind's words begin."""

_AHEAD = "IFT is ahead here, of the rivals that were run."
_AHEAD_OF_SEARCHES = "IFT is ahead here, of searches that leave the validation examples alone."
_OPENINGS = {
    Conclusion.OTHER_BETTER: "IFT is not worth it here.",
    Conclusion.NO_EVIDENCE: "Whether IFT is worth it here is not shown.",
    Conclusion.REFERENCE_BETTER: "IFT is worth it here.",
}


@dataclass(frozen=True)
class ComparisonVerdict:
    """What a comparison comes to.

    Attributes:
        headline: Whether IFT is worth it here, in a sentence.
        others: A sentence about each further arm.
        notes: What limits the answer: too few seeds, unfinished searches.
    """

    headline: str
    others: list[str]
    notes: list[str]


def judge(findings: Findings) -> ComparisonVerdict:
    """Return the verdict.

    IFT is worth it where it is better than every arm without it, and not worth it where one of
    them is better. The headline is about the arm that decides: the best of those that IFT does not
    beat; else `FIRST`, if it is there.
    """
    order = sorted(findings.against, key=lambda a: a.other != FIRST)
    notes = _notes(findings)
    if not order:
        arm = findings.arm(findings.reference)
        headline = (
            f"{capitalise(display_name(arm.name))} alone was run: test {findings.measure} after "
            f"retraining {arm.retrained.mean:.4g}; there is nothing to compare it with."
        )
        return ComparisonVerdict(headline, [], notes)
    sentences = [_sentence(findings, a) for a in order]
    asked = [arm for arm in REFERENCES if arm in findings.about["run"]["extent"]["arms"]]
    if asked and findings.reference not in asked[:1]:
        lost = capitalise(display_name(asked[0]))
        headline = f"{lost} has found nothing that could be retrained, so it is not compared."
        return ComparisonVerdict(headline, sentences, notes)
    # The other IFT arm is no alternative to IFT.
    rivals = [a for a in order if a.other not in REFERENCES] or order
    outcome = min(a.conclusion for a in rivals)
    deciding = [a for a in rivals if a.conclusion is outcome]
    if outcome is not Conclusion.REFERENCE_BETTER:
        deciding.sort(key=lambda a: a.direction.sign * (a.theirs - a.ours))
    headline = _sentence(findings, deciding[0])
    if findings.reference in REFERENCES:
        # Worth it only if it beats the simplest uses of the examples that it sees.
        opening, lacking = _OPENINGS[outcome], _lacking(findings)
        if outcome is Conclusion.REFERENCE_BETTER and lacking:
            opening = _AHEAD_OF_SEARCHES if set(RIVALS) <= set(lacking) else _AHEAD
        headline = f"{opening} {headline}"
    others = [_sentence(findings, a) for a in order if a != deciding[0]]
    return ComparisonVerdict(headline, others, notes)


def display_name(arm: str) -> str:
    """Return an arm's name in a sentence; that of one we do not know is as the tables have it."""
    return ARMS[arm].phrase if arm in ARMS else arm


def capitalise(text: str) -> str:
    """Return the text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def format_count(number: int, name: str) -> str:
    """Return "1 seed", "2 seeds"."""
    return f"{number} {name}{'s' * (number != 1)}"


def _sentence(findings: Findings, against: Against) -> str:
    reference, other = display_name(findings.reference), display_name(against.other)
    if not against.test.pairs:
        return f"{capitalise(reference)} and {other} have no seed in common."
    claims = {
        Conclusion.OTHER_BETTER: f"{capitalise(other)} is better than {reference}",
        Conclusion.NO_EVIDENCE: f"No evidence that {reference} and {other} differ",
        Conclusion.REFERENCE_BETTER: f"{capitalise(reference)} is better than {other}",
    }
    return (
        f"{claims[against.conclusion]}: test {findings.measure} after retraining "
        f"{against.ours:.4g} against {against.theirs:.4g} ({_evidence(against)})."
    )


def _evidence(against: Against) -> str:
    """Return the difference with its interval and its test."""
    d, test = against.difference, against.test
    between = f", 95 % interval {d.low:.4g} to {d.high:.4g}" if math.isfinite(d.low) else ""
    return (
        f"difference {d.mean:.4g}{between}; {against.direction.comparative} in "
        f"{test.wins} of {test.pairs} seeds; "
        f"p = {against.p_holm:.2g} with Holm's correction"
    )


def _notes(findings: Findings) -> list[str]:
    notes = []
    needed = pairs_needed(len(findings.against))
    fewest = min((a.test.pairs for a in findings.against), default=needed)
    if fewest < needed:
        notes.append(
            f"Too few seeds: with {format_count(fewest, 'pair')} the test cannot go below p = "
            f"{least_p(fewest):.4g}, and {format_count(len(findings.against), 'comparison')} at "
            f"the level {LEVEL:g} take at least {needed} seeds, however large the difference."
        )
    for against in findings.against:
        ours, theirs = findings.reference, against.other
        for arm, than, seeds in (
            (ours, theirs, against.we_lack),
            (theirs, ours, against.they_lack),
        ):
            if seeds:
                notes.append(
                    f"{capitalise(display_name(arm))} found nothing that could be retrained in "
                    f"{seeds} of the seeds in which {display_name(than)} did. Its mean leaves out "
                    "where it fails, so it is not called better."
                )
    if lacking := _lacking(findings):
        notes.append(
            "IFT learns from the validation examples. Whether it is worth it, "
            + " and ".join(f"{name} ({display_name(name)})" for name in lacking)
            + f" would tell: --resume with --arms {','.join(lacking)} adds what is missing."
        )
    notes += _diagnosed(findings)
    extent = findings.about["run"]["extent"]
    wanted = len(extent["arms"]) * len(extent["seeds"])
    if wanted > len(findings.chosen):
        notes.append(
            f"{wanted - len(findings.chosen)} of {wanted} searches have not found anything yet: "
            "the comparison is unfinished, or they failed (see stop_reason in the tables)."
        )
    return notes


def _lacking(findings: Findings) -> list[str]:
    """Return the rivals that IFT has not been compared with; none where it was with no one."""
    others = {against.other for against in findings.against}
    if findings.reference not in REFERENCES or others <= set(REFERENCES):
        return []
    # One that was run and has found nothing is not to be had by running it again.
    run = others | set(findings.about["run"]["extent"]["arms"])
    return [name for name in (*RIVALS, *_rivals_of_kinds(findings)) if name not in run]


def _rivals_of_kinds(findings: Findings) -> list[str]:
    """Return the rivals of the kinds that λ has, by what it says of itself."""
    trials = findings.results.trials
    if "learned_words" not in trials:  # tables of before kinds had any
        return []
    said = set(trials["learned_words"].dropna())
    return [
        rival
        for kind, rivals in RIVALS_OF_KINDS.items()
        if any(f"{kind}: " in words for words in said)
        for rival in rivals
    ]


def _diagnosed(findings: Findings) -> list[str]:
    """Return what the chosen trials of IFT have in common that speaks against them."""
    trials, keys = findings.results.trials, ["arm", "seed", "trial"]
    if DIAGNOSES not in trials:  # tables of before there were any
        return []
    chosen = findings.chosen[keys].merge(trials[[*keys, DIAGNOSES]], on=keys)
    return [
        f"{capitalise(display_name(str(arm)))}: {said}."
        for arm, rows in chosen.groupby("arm", sort=False)
        for said in counted(rows[DIAGNOSES])
    ]
