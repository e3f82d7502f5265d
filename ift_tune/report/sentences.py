"""What the figures come to, in sentences; the verdict's own are in `compare.verdict`."""

from __future__ import annotations

import math

import pandas as pd

from ift_tune.base.status import SolveStatus
from ift_tune.compare.findings import Findings
from ift_tune.compare.verdict import capitalise, display_name
from ift_tune.report.figures.hypergradients import outer_steps
from ift_tune.report.figures.searches import complete, searched, searching
from ift_tune.report.palette import arm_style
from ift_tune.report.wording import number, percent
from ift_tune.search.analysis import LEAST_TRIALS

_OFTEN = 0.05  # share of outer steps from which advice is given
_FINE = (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)


def gap_sentences(findings: Findings) -> list[str]:
    """Say how much better the choices looked than they are."""
    listed = ", ".join(
        f"{arm_style(arm.name).label} {_signed(arm.optimism)}" for arm in findings.arms
    )
    sentences = [
        f"Test {findings.measure} after retraining minus the search value by which it was chosen, "
        f"on average: {listed}. "
        "The best of many looks better than it is, so a little above 0 is normal; below 0 the "
        "search split is the harder one."
    ]
    sentences += [
        f"{capitalise(display_name(arm.name))} fits its hyperparameters to the validation split. "
        f"At the weights of the choice its test {findings.measure} was "
        f"{number(abs(arm.val_test_gap))} "
        + (
            "above that of the validation split: the larger this gap, the more they overfit it."
            if arm.val_test_gap > 0
            else "below that of the validation split, so nothing says that they overfit it."
        )
        for arm in findings.arms
        if math.isfinite(arm.val_test_gap)
    ]
    return sentences


def health_sentences(findings: Findings) -> list[str]:
    """Say how the linear solves went, and what to do where they often went wrong."""
    arms = outer_steps(findings)
    if not arms:
        return ["No arm of this comparison uses hypergradients."]
    shares = [_shares(steps) for steps in arms.values()]
    wrong = [
        status
        for status in SolveStatus
        if status not in _FINE and any(s.get(status.value, 0.0) >= _OFTEN for s in shares)
    ]
    advice = [
        f"{capitalise(_words(status.value))}: {status.advice.replace('`', '')}" for status in wrong
    ]
    return [*(_health(name, steps) for name, steps in arms.items()), *advice]


def search_sentences(findings: Findings) -> list[str]:
    """Say which arms have too few trials for an importance."""
    arms = searching(findings)
    if not arms:
        return ["Every arm ran a single trial for each seed, so there is no search to look into."]
    few = {
        name: len(complete(trials))
        for name, trials in arms.items()
        if len(complete(trials)) < LEAST_TRIALS and searched(trials)
    }
    if not few:
        return []
    listed = ", ".join(f"{arm_style(name).label} has {count}" for name, count in few.items())
    return [f"Importance takes at least {LEAST_TRIALS} complete trials: {listed}."]


def _health(name: str, steps: pd.DataFrame) -> str:
    parts = [f"{percent(share)} {_words(str(s))}" for s, share in _shares(steps).items()]
    text = f"{capitalise(display_name(name))}: linear solves {', '.join(parts)}"
    for column, words in (
        ("relative_residual", "median relative residual"),
        ("alpha_lambda_max", "median α·λ_max"),
    ):
        if column in steps and steps[column].notna().any():
            text += f"; {words} {number(float(steps[column].median()))}"
    if "skipped" in steps:
        text += f"; λ left as it was in {percent(float(steps['skipped'].mean()))} of outer steps"
    return f"{text}."


def _shares(steps: pd.DataFrame) -> pd.Series[float]:
    """Return the share of each status, the largest first."""
    shares = steps["solve_status"].value_counts(normalize=True).sort_index()
    return shares.sort_values(ascending=False, kind="stable")


def _words(status: str) -> str:
    return status.replace("_", " ")


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
