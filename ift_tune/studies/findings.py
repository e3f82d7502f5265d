"""What the tables of costs and of validation sizes come to, in sentences."""

from __future__ import annotations

import pandas as pd

from ift_tune.base.statistics import student_interval
from ift_tune.studies.writing import Finding, Verdict, decided

SIZE = "size"

A_FEW = 5.0
"""How many times is "a few times", in the claim that is judged."""

_CONSTANT = 1.05  # largest over smallest, up to which memory counts as constant
_PROPORTION = 1.1  # how much faster than P + H memory may grow and count as in proportion

NONE, ONE, EACH = "none", "one", "each"

PAPER = {ONE: (0.075, 0.15), EACH: (0.25, 0.5)}
"""Fractions that the paper finds best: about 10 % for one decay, 25 to 50 % for one a weight."""

_SAID = {ONE: "about 10 %", EACH: "25 to 50 %"}
_NAMES = {ONE: "one decay", EACH: "a decay for every weight"}
_METRIC = "retrained_all_test_error"


def judge_costs(table: pd.DataFrame, inner_steps: int) -> list[Finding]:
    """Return the findings.

    Args:
        table: Rows of the study.
        inner_steps: The T of the configuration, for which the multiples are given.
    """
    by_t = table[table["sweep"] == "inner_steps"].sort_values("value")
    by_k = table[table["sweep"] == "terms"].sort_values("value")
    by_size = table[table["sweep"] == SIZE]
    found = []
    own = by_t[by_t["value"] == inner_steps]
    if len(own):
        found += [
            _few(own.iloc[0], column, what)
            for column, what in (("time_ratio", "time"), ("memory_ratio", "memory"))
        ]
    if len(by_t) > 1:
        found += [_constant(by_t, "T, the inner steps"), *_amortised(by_t), *_unrolled(by_t)]
    if len(by_k) > 1:
        found += [_constant(by_k, "K, the terms"), _priced(by_k)]
    if len(by_size):
        found += [_equal_batches(by_size), _proportional(by_size), _many(by_size)]
    return found


def _few(row: pd.Series, column: str, what: str) -> Finding:
    ratio = float(row[column])
    terms = "" if pd.isna(row["terms"]) else f", K = {row['terms']}"
    return Finding(
        f"a few times the {what}",
        Verdict.CONFIRMED if ratio <= A_FEW else Verdict.CONTRADICTED,
        f"At T = {row['inner_steps']}{terms} joint tuning takes {ratio:.2f} times the "
        f"{what} of plain training, which is to be a few times, at most {A_FEW:g} "
        f"({row['weights']:,} weights, {row['hypers']:,} hyperparameters; an inner step looks at "
        f"{row['inner_batch']} examples, an outer step at {row['outer_batch']})",
    )


def _constant(rows: pd.DataFrame, what: str) -> Finding:
    ratio = float(rows["joint_bytes"].max() / rows["joint_bytes"].min())
    return Finding(
        f"memory constant in {what[0]}",
        Verdict.CONFIRMED if ratio <= _CONSTANT else Verdict.CONTRADICTED,
        f"The peak memory of joint tuning does not grow with {what}: largest over smallest "
        f"{ratio:.4f} for {what[0]} from {rows['value'].min()} to {rows['value'].max()}",
    )


def _amortised(rows: pd.DataFrame) -> list[Finding]:
    first, last = rows.iloc[0], rows.iloc[-1]
    return [
        Finding(
            "more inner steps make it relatively cheaper",
            Verdict.CONFIRMED if last["time_ratio"] < first["time_ratio"] else Verdict.CONTRADICTED,
            f"Joint tuning takes {first['time_ratio']:.2f} times the time of plain training at "
            f"T = {first['value']} and {last['time_ratio']:.2f} times at T = {last['value']}, for "
            "an outer step's cost does not depend on T",
        )
    ]


def _unrolled(rows: pd.DataFrame) -> list[Finding]:
    tried = rows.dropna(subset=["unrolled_bytes"])
    if len(tried) < 2:
        return []
    first, last = tried.iloc[0], tried.iloc[-1]
    growth = float(last["unrolled_bytes"] / first["unrolled_bytes"])
    return [
        Finding(
            "unrolling's memory grows with T",
            Verdict.CONFIRMED if growth > _CONSTANT else Verdict.CONTRADICTED,
            f"Unrolling's peak memory grows {growth:.1f} times from T = {first['value']} to "
            f"T = {last['value']}, where it is "
            f"{float(last['unrolled_bytes'] / last['joint_bytes']):.1f} times that of joint tuning",
        )
    ]


def _priced(rows: pd.DataFrame) -> Finding:
    first, last = rows.iloc[0], rows.iloc[-1]
    return Finding(
        "price of a term",
        Verdict.NOTE,
        f"At T = {first['inner_steps']}, joint tuning takes {first['time_ratio']:.2f} times the "
        f"time of plain training with K = {first['value']} and {last['time_ratio']:.2f} times with "
        f"K = {last['value']}.",
    )


def _equal_batches(rows: pd.DataFrame) -> Finding:
    many = rows[rows["per"] == "weight"]
    low, high = float(many["memory_ratio"].min()), float(many["memory_ratio"].max())
    return Finding(
        "a few times the memory, equal batches",
        Verdict.CONFIRMED if high <= A_FEW else Verdict.CONTRADICTED,
        f"Where inner and outer steps look at equally many examples, nets of "
        f"{many['weights'].min():,} to {many['weights'].max():,} weights with a decay for each "
        f"take {low:.2f} to {high:.2f} times the memory of plain training, at most {A_FEW:g}",
    )


def _proportional(rows: pd.DataFrame) -> Finding:
    many = rows[rows["per"] == "weight"].sort_values("weights")
    first, last = many.iloc[0], many.iloc[-1]
    size = float((last["weights"] + last["hypers"]) / (first["weights"] + first["hypers"]))
    memory = float(last["joint_bytes"] / first["joint_bytes"])
    return Finding(
        "memory in proportion to P + H",
        Verdict.CONFIRMED if memory <= _PROPORTION * size else Verdict.CONTRADICTED,
        f"With a decay for every weight, peak memory grows no faster than P + H: {memory:.1f} "
        f"times from {first['weights']:,} to {last['weights']:,} weights, P + H {size:.1f} times",
    )


def _many(rows: pd.DataFrame) -> Finding:
    width = rows["value"].max()
    pair = rows[rows["value"] == width].set_index("per")
    one, many = pair.loc["model"], pair.loc["weight"]
    return Finding(
        "a decay for every weight against one",
        Verdict.NOTE,
        f"With {one['weights']:,} weights, a decay for each takes "
        f"{float(many['joint_seconds'] / one['joint_seconds']):.2f} times the time and "
        f"{float(many['joint_bytes'] / one['joint_bytes']):.2f} times the memory of one decay for "
        "all.",
    )


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
