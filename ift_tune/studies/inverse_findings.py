"""What the tables of the inverse-Hessian study say, in sentences that may contradict the paper."""

from __future__ import annotations

import itertools

import pandas as pd

from ift_tune.studies.methods import UNROLLED
from ift_tune.studies.writing import Finding, Verdict, tallied

INITIAL, TRAINED = "initial", "trained"
NEUMANN, CG = "neumann", "conjugate_gradient"

_STATIONARY = 1e-6  # gradient norm above which unrolling need not equal the series
_EQUAL = 1e-6  # relative difference up to which it does, in float64
_HARDLY = 1e-3  # relative change of a distance that is no help and no harm
_ROUNDING = 1e-9  # two figures nearer than this are the same


def judge_inverses(
    inverse: pd.DataFrame, states: pd.DataFrame, relation: pd.DataFrame, cosine: float
) -> list[Finding]:
    """Return the findings, those at the trained weights first.

    Args:
        inverse: A row for each state, method and number of steps.
        states: The reference at each state.
        relation: Unrolling against Neumann.
        cosine: The quality asked of the cheapest method.
    """
    findings = []
    for state in (TRAINED, INITIAL):
        rows = inverse[inverse["state"] == state]
        about = states[states["state"] == state]
        if rows.empty or about.empty:
            continue
        findings.append(_reference(state, about.iloc[0]))
        findings.append(_cheapest(state, rows, cosine))
        findings.append(_per_step(state, rows, "cosine", "Neumann has the better cosine per step"))
        findings.append(
            _per_step(state, rows, "relative_l2", "conjugate gradient has the smaller L2 distance")
        )
        findings += [_more_terms(state, rows, method) for method in (NEUMANN, CG)]
        findings.append(_relation(state, relation, float(about.iloc[0]["gradient_norm"])))
    return findings


def _reference(state: str, about: pd.Series) -> Finding:
    smallest, largest = about["smallest_eigenvalue"], about["largest_eigenvalue"]
    text = (
        f"At the {state} weights ({about['weights_found_by']}; gradient norm "
        f"{about['gradient_norm']:.1e}) the reference is {about['reference']} with a relative "
        f"residual of {about['reference_residual']:.1e}; H has eigenvalues from {smallest:.2e} to "
        f"{largest:.2e}"
    )
    if about["indefinite"]:
        text += (
            ". H is indefinite: the reference solves an indefinite system, which no series and no "
            "positive semi-definite matrix comes near"
        )
    return Finding(f"{state}: reference", Verdict.NOTE, f"{text}.")


def _cheapest(state: str, rows: pd.DataFrame, cosine: float) -> Finding:
    """Name the cheapest hypergradient of the quality asked for."""
    claim = f"{state}: cheapest"
    good = rows[rows["cosine"] >= cosine]
    if good.empty:
        best = rows.sort_values("cosine", ascending=False).iloc[0]
        return Finding(
            claim,
            Verdict.NOTE,
            f"At the {state} weights no method reaches cosine {cosine:g}; the best is "
            f"{best['method']} at {best['steps']} steps with {best['cosine']:.3f}.",
        )
    first = good.sort_values(["gradient_equivalents", "cosine"], ascending=[True, False]).iloc[0]
    return Finding(
        claim,
        Verdict.NOTE,
        f"At the {state} weights the cheapest method above cosine {cosine:g} is "
        f"{first['method']} at {first['steps']} steps: cosine {first['cosine']:.3f}, "
        f"{first['gradient_equivalents']:.3g} gradient-equivalents ({first['products']} products).",
    )


def _per_step(state: str, rows: pd.DataFrame, column: str, claim: str) -> Finding:
    """Compare Neumann with conjugate gradient at equal numbers of steps."""
    columns = [column, f"{column}_q"]
    sides = [
        rows[rows["method"] == method].set_index("steps")[columns].add_suffix(suffix)
        for method, suffix in ((NEUMANN, "_n"), (CG, "_c"))
    ]
    both = sides[0].join(sides[1], how="inner").dropna()
    both = both[both.index > 0]
    counts = {}
    for name in columns:
        # In both claims the first of the pair is the one that shall be the larger.
        ahead, behind = both[f"{name}_n"], both[f"{name}_c"]
        different = (ahead - behind).abs() > _ROUNDING
        counts[name] = (int((different & (ahead > behind)).sum()), int(different.sum()))
    holds, total = counts[column]
    holds_q, total_q = counts[f"{column}_q"]
    return Finding(
        f"{state}: {claim}",
        tallied(holds, total),
        f"At the {state} weights, that {claim} holds for the hypergradient at {holds} of {total} "
        f"numbers of steps (for q at {holds_q} of {total_q})",
    )


def _more_terms(state: str, rows: pd.DataFrame, method: str) -> Finding:
    """Say whether each larger number of steps comes nearer to the exact answer."""
    course = rows[rows["method"] == method].sort_values("steps").dropna(subset=["relative_l2"])
    distance = course["relative_l2"].to_numpy()
    cosines = course["cosine"].to_numpy()
    better = [after <= before + _ROUNDING for before, after in itertools.pairwise(distance)]
    claim = f"{state}: more {method} steps help"
    if not better:
        return Finding(claim, Verdict.UNDECIDED, f"At the {state} weights, {claim}: not measured")
    verdict = tallied(sum(better), len(better))
    if verdict is Verdict.MIXED and distance[-1] > distance[0]:
        verdict = Verdict.CONTRADICTED  # whatever helped on the way, the end is worse
    if abs(distance[-1] - distance[0]) <= _HARDLY * distance[0]:
        verdict = Verdict.UNDECIDED  # as where a solve stops at once, at negative curvature
    steps = course["steps"].to_numpy()
    return Finding(
        claim,
        verdict,
        f"At the {state} weights, more {method} steps help: from {steps[0]} to {steps[-1]} the "
        f"cosine of the hypergradient goes from {cosines[0]:.3f} to {cosines[-1]:.3f} and its "
        f"relative L2 distance from {distance[0]:.3g} to {distance[-1]:.3g}, the latter smaller "
        f"at {sum(better)} of {len(better)} increases",
    )


def _relation(state: str, relation: pd.DataFrame, gradient_norm: float) -> Finding:
    """Say how far k unrolled steps are from Neumann with K = k − 1."""
    claim = f"{state}: {UNROLLED} equals neumann"
    rows = relation[relation["state"] == state] if len(relation) else relation
    if rows.empty:
        return Finding(claim, Verdict.UNDECIDED, "Unrolling was not compared with Neumann")
    worst = rows.sort_values("relative_difference", ascending=False).iloc[0]
    figure = (
        f"largest relative difference {worst['relative_difference']:.1e}, at k = "
        f"{worst['unrolled_steps']}"
    )
    if gradient_norm > _STATIONARY:
        return Finding(
            claim,
            Verdict.NOTE,
            f"At the {state} weights, no stationary point (gradient norm {gradient_norm:.1e}), k "
            f"unrolled steps need not equal Neumann with K = k − 1: {figure}.",
        )
    return Finding(
        claim,
        Verdict.CONFIRMED if worst["relative_difference"] <= _EQUAL else Verdict.CONTRADICTED,
        f"At the {state} weights k unrolled steps equal Neumann with K = k − 1: {figure}",
    )
