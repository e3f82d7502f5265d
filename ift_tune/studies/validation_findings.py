"""What the table of the validation-size study says, in sentences that may contradict the paper."""

from __future__ import annotations

import pandas as pd

from ift_tune.base.statistics import student_interval
from ift_tune.studies.writing import Finding, Verdict, decided

NONE, ONE, EACH = "none", "one", "each"
PAPER = {ONE: (0.075, 0.15), EACH: (0.25, 0.5)}
"""Fractions that the paper finds best: about 10 % for one decay, 25 to 50 % for one a weight."""

_SAID = {ONE: "about 10 %", EACH: "25 to 50 %"}
_NAMES = {ONE: "one decay", EACH: "a decay for every weight"}
_METRIC = "retrained_all_test_error"


def judge_fractions(table: pd.DataFrame) -> list[Finding]:
    """Return the findings for each number of points.

    Args:
        table: A row a training.
    """
    found = []
    for total in sorted(table["total"].unique()):
        of_total = table[table["total"] == total]
        found += [_best(of_total, int(total), tuned) for tuned in (ONE, EACH)]
        found.append(_ordered(of_total, int(total)))
        found += [_pays(of_total, int(total), tuned) for tuned in (ONE, EACH)]
    found.append(_retraining(table))
    return found


def _by_fraction(rows: pd.DataFrame, tuned: str) -> pd.DataFrame:
    """Return test errors, a row a seed, a column a fraction."""
    return rows[rows["tuned"] == tuned].pivot(index="seed", columns="fraction", values=_METRIC)


def _means(errors: pd.DataFrame) -> dict[float, float]:
    """Return the mean error by fraction."""
    values = errors.mean()
    return dict(zip(values.index.to_numpy(dtype=float), values.to_numpy(dtype=float), strict=True))


def _said(means: dict[float, float], tuned: str) -> list[float]:
    """Return the fractions tried that the paper finds best."""
    low, high = PAPER[tuned]
    return [fraction for fraction in means if low <= fraction <= high]


def _best(rows: pd.DataFrame, total: int, tuned: str) -> Finding:
    """Compare the best fraction in the paper's range with the best outside of it."""
    errors = _by_fraction(rows, tuned)
    means = _means(errors)
    best = min(means, key=means.__getitem__)
    inside = _said(means, tuned)
    outside = [f for f in means if f not in inside]
    text = (
        f"With {total} points and {_NAMES[tuned]}, {100 * best:g} % for validation is best (test "
        f"error {means[best]:.4f} retrained on all points, mean of {len(errors)} seeds); the paper "
        f"says {_SAID[tuned]}"
    )
    claim = f"{total} points, {tuned}: best fraction"
    if not inside or not outside:
        return Finding(claim, Verdict.UNDECIDED, f"{text}, which the fractions tried do not judge")
    rival_in, rival_out = (min(side, key=means.__getitem__) for side in (inside, outside))
    # Both rivals are the best of theirs, so the test answers for every pair they were taken from.
    found = student_interval(
        (errors[rival_out] - errors[rival_in]).to_numpy(), comparisons=len(inside) * len(outside)
    )
    text += (
        f" ({100 * rival_in:g} % is {_signed(found.mean, 'better', 'worse')} than "
        f"{100 * rival_out:g} %, standard error {found.error:.4f})"
    )
    return Finding(claim, decided(found.low, found.high), text)


def _ordered(rows: pd.DataFrame, total: int) -> Finding:
    """Say whether many hyperparameters want more validation points than one, seed by seed."""
    best = {tuned: _by_fraction(rows, tuned).idxmin(axis="columns") for tuned in (ONE, EACH)}
    found = student_interval((best[EACH] - best[ONE]).astype(float).tolist())
    return Finding(
        f"{total} points: many hyperparameters want more validation points",
        decided(found.low, found.high),
        f"With {total} points, many hyperparameters want more validation points than one: the best "
        f"fraction of a seed is {100 * best[EACH].mean():.0f} % on average against "
        f"{100 * best[ONE].mean():.0f} % (standard error of the difference "
        f"{100 * found.error:.0f} %)",
    )


def _pays(rows: pd.DataFrame, total: int, tuned: str) -> Finding:
    """Compare tuning at a fraction of the paper's, chosen before looking, with no tuning at all."""
    errors, untuned = _by_fraction(rows, tuned), _by_fraction(rows, NONE)
    inside = _said(_means(errors), tuned)
    claim = f"{total} points, {tuned}: tuning pays"
    if not inside or untuned.empty:
        return Finding(claim, Verdict.UNDECIDED, f"{claim}: not measured")
    fraction = inside[0]
    found = student_interval((untuned[fraction] - errors[fraction]).to_numpy())
    return Finding(
        claim,
        decided(found.low, found.high),
        f"With {total} points, tuning {_NAMES[tuned]} on {100 * fraction:g} % and retraining on "
        f"all is better than the initial decay trained on all: "
        f"{_signed(found.mean, 'better', 'worse')}, standard error {found.error:.4f}",
    )


def _retraining(table: pd.DataFrame) -> Finding:
    tuned = table[table["tuned"] != NONE]
    gain = (tuned["retrained_train_test_error"] - tuned[_METRIC]).mean()
    return Finding(
        "retraining on all points",
        Verdict.CONFIRMED if gain > 0 else Verdict.CONTRADICTED,
        "Retraining on all points is better than on the training points alone: test error "
        f"{_signed(float(gain), 'lower', 'higher')}, mean of all sizes",
    )


def _signed(difference: float, above: str, below: str) -> str:
    """Return "0.0120 better", "0.0120 worse"."""
    return f"{abs(difference):.4f} {above if difference >= 0 else below}"
