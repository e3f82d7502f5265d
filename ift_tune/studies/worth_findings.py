"""Who wins where on a map of worth: from what each search found to a verdict for each cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ift_tune.base.statistics import LEVEL, holm, student_interval
from ift_tune.compare.findings import REFERENCES
from ift_tune.compare.verdict import capitalise, format_count
from ift_tune.studies.writing import Finding, Verdict

CELL = ["data", "job", "noise", "clean"]
"""The columns that name a cell of the map."""

_WINNER = ["verdict", "winner", "reference", "reference_error", "rival", "rival_error"]
_MARGIN = ["difference", "low", "high", "p_holm", "seeds", "rivals"]

IFT, RIVAL, OPEN = "ift", "rival", "open"
"""Verdicts of a cell: IFT is better than every rival; a rival is better than IFT; neither shows."""

_LEAST_PAIRS = 3
_ROUNDING = 1e-9  # of differences that are equal
_POINTS = 100.0  # of an error, as a percentage


class _Against(NamedTuple):
    """An arm against the reference over the seeds of both: its mean error minus the reference's."""

    pairs: int
    difference: float
    low: float
    high: float
    p: float


def compare_arms(searches: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each arm of each cell: its mean error, and how it differs from IFT's.

    The reference of a cell is the first of `REFERENCES` that was run there: said beforehand, so
    that no result decides which arm the verdict is about. The others of them are no rivals.

    Args:
        searches: A row a search: the columns of `CELL`, ``arm``, ``seed``, and ``retrained``, the
            test error of its choice after retraining; missing where it found nothing.

    Returns:
        Beside the columns of `CELL`: ``arm``, ``reference``, ``role`` (reference, ift or rival),
        ``seeds``, ``error``, ``standard_error``, ``pairs``, ``difference`` (its error minus the
        reference's: above 0, IFT is better), ``low``, ``high`` (its 95 % t interval), ``p`` (of the
        paired t-test), ``only_it`` and ``only_reference`` (seeds in which one of the two alone
        found something) and ``p_holm`` (of a rival: `p`, adjusted for the rivals of the cell).
    """
    rows: list[dict[str, Any]] = []
    for names, cell in searches.groupby(CELL, sort=False):
        wide = cell.pivot(index="seed", columns="arm", values="retrained").astype(float)
        arms = [str(arm) for arm in cell["arm"].unique()]
        reference = next((name for name in REFERENCES if name in arms), arms[0])
        rivals = [arm for arm in arms if arm not in REFERENCES and arm != reference]
        for arm in arms:
            own, theirs = wide[arm], wide[reference]
            found = _against(own - theirs)
            role = "rival" if arm in rivals else "reference" if arm == reference else "ift"
            rows.append(
                {
                    **dict(zip(CELL, names, strict=True)),
                    "arm": arm,
                    "reference": reference,
                    "role": role,
                    "seeds": int(own.notna().sum()),
                    "error": float(own.mean()),
                    "standard_error": float(own.std()) / max(1, own.count()) ** 0.5,
                    **found._asdict(),
                    "only_it": int((own.notna() & theirs.isna()).sum()),
                    "only_reference": int((own.isna() & theirs.notna()).sum()),
                }
            )
    table = pd.DataFrame(rows)
    for _, cell in table[table["role"] == "rival"].groupby(CELL, sort=False):
        table.loc[cell.index, "p_holm"] = holm(cell["p"].tolist())
    return table


def _against(differences: pd.Series[float]) -> _Against:
    values = np.asarray(differences.dropna(), dtype=np.float64)
    if not len(values):
        return _Against(0, math.nan, -math.inf, math.inf, 1.0)
    found = student_interval(values)
    if found.mean and np.ptp(values) <= _ROUNDING * abs(found.mean):
        # Errors are counts, of which a few are easily the same: how they vary is not known.
        found = student_interval([found.mean])
    p = 1.0  # of differences that are all 0
    if found.error:
        p = 2.0 * float(stats.t.sf(abs(found.mean) / found.error, max(1, len(values) - 1)))
    return _Against(len(values), found.mean, found.low, found.high, p)


def find_winners(arms: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each cell: who wins, by how much, and against whom that was decided.

    IFT wins where it is better than every rival, a rival wins where one is better than IFT, each by
    a paired t-test with Holm's correction for the rivals of the cell. With fewer than three seeds
    nothing is decided, nor is an arm called better that found nothing in a seed in which the other
    did.

    Args:
        arms: Of `compare_arms`.

    Returns:
        Beside the columns of `CELL`: ``verdict`` (one of `IFT`, `RIVAL`, `OPEN`), ``winner`` (the
        arm of the lowest mean error, whether that is shown or not), ``reference`` and
        ``reference_error``, ``rival`` (the best of those that are better than IFT; where none is,
        of all) and ``rival_error``, ``difference`` (rival minus reference), ``low``, ``high``,
        ``p_holm``, ``seeds`` (of both) and ``rivals`` (how many). A cell without a rival is left
        out.
    """
    rows: list[dict[str, Any]] = []
    for names, cell in arms.groupby(CELL, sort=False):
        own = cell[cell["role"] == "reference"].iloc[0]
        rivals = cell[(cell["role"] == "rival") & (cell["pairs"] > 0)]
        if rivals.empty:
            continue
        shown = (rivals["pairs"] >= _LEAST_PAIRS) & (rivals["p_holm"] < LEVEL)
        sign = np.sign(rivals["difference"])
        better = rivals[shown & (sign < 0) & (rivals["only_reference"] == 0)]
        worse = shown & (sign > 0) & (rivals["only_it"] == 0)
        # A rival that has no seed with the reference has not been beaten.
        beaten = bool(worse.all()) and len(rivals) == (cell["role"] == "rival").sum()
        verdict = RIVAL if len(better) else IFT if beaten else OPEN
        deciding = better if len(better) else rivals
        rival = deciding.sort_values("difference", kind="stable").iloc[0]
        rows.append(
            {
                **dict(zip(CELL, names, strict=True)),
                "verdict": verdict,
                "winner": cell.sort_values("difference", kind="stable").iloc[0]["arm"],
                "reference": own["arm"],
                "reference_error": own["error"],
                "rival": rival["arm"],
                "rival_error": rival["error"],
                "difference": rival["difference"],
                "low": rival["low"],
                "high": rival["high"],
                "p_holm": rival["p_holm"],
                "seeds": rival["pairs"],
                "rivals": len(rivals),
            }
        )
    return pd.DataFrame(rows, columns=[*CELL, *_WINNER, *_MARGIN])


def judge_worth(winners: pd.DataFrame, asked: int, lacking: Sequence[str] = ()) -> list[Finding]:
    """Return the findings: the whole map in a sentence, then each part of it, then its limits.

    Args:
        winners: Of `find_winners`.
        asked: How many cells were asked for.
        lacking: Arms without which nobody knows whether IFT is worth it, and that were not run.
    """
    found: list[Finding] = []
    if len(winners):
        found = [_whole(winners, lacking), *_parts(winners), _resolution(winners)]
    if lacking:
        found.append(
            Finding(
                "rivals that were not run",
                Verdict.NOTE,
                "IFT learns from the validation examples. Whether it is worth it, "
                f"{' and '.join(lacking)} would tell: add what is missing to the arms.",
            )
        )
    if len(winners) < asked:
        found.append(
            Finding(
                "cells without a comparison",
                Verdict.NOTE,
                f"In {format_count(asked - len(winners), 'cell')} of {asked} IFT and a rival have "
                "not both found something: the budget did not pay for a step, or trials failed.",
            )
        )
    return found


def _whole(winners: pd.DataFrame, lacking: Sequence[str]) -> Finding:
    total = len(winners)
    count = {v: int((winners["verdict"] == v).sum()) for v in (IFT, RIVAL, OPEN)}
    ahead = "is ahead of the rivals that were run" if lacking else "is worth it"
    often = winners.loc[winners["verdict"] == RIVAL, "rival"].mode()
    most = f", most often {often[0]}" if count[RIVAL] > 1 else ""
    parts = [
        f"IFT {ahead} in {_of(count[IFT])} of {format_count(total, 'cell')}"
        f"{_where(winners, IFT, ranges=True)}",
        f"a rival is better in {_of(count[RIVAL])}{most}{_where(winners, RIVAL)}",
        f"and neither is shown in {_of(count[OPEN])}",
    ]
    if count[IFT] == total:
        verdict = Verdict.UNDECIDED if lacking else Verdict.CONFIRMED
    elif count[IFT]:
        verdict = Verdict.MIXED
    else:
        verdict = Verdict.CONTRADICTED if count[RIVAL] else Verdict.UNDECIDED
    return Finding("IFT is worth it", verdict, ", ".join(parts))


def _of(count: int) -> str:
    return str(count) if count else "none"


def _where(winners: pd.DataFrame, verdict: str, *, ranges: bool = False) -> str:
    """Return " (cleaning 5 of 18, at noise 0.5 to 0.8 with 200 to 1,000 clean examples)"."""
    told = []
    for job, cells in winners.groupby("job", sort=False):
        here = cells[cells["verdict"] == verdict]
        if len(here):
            told.append(f"{job} {len(here)} of {len(cells)}")
        if ranges and 0 < len(here) < len(cells):
            noise, clean = _range(here["noise"], "g"), _range(here["clean"], ",")
            told[-1] += f", at noise {noise} with {clean} clean examples"
    return f" ({'; '.join(told)})" if told else ""


def _range(values: pd.Series[float], style: str) -> str:
    low, high = values.min(), values.max()
    return f"{low:{style}}" if low == high else f"{low:{style}} to {high:{style}}"


def _parts(winners: pd.DataFrame) -> list[Finding]:
    """Return a sentence for each job on each data set, with all of its cells that are decided."""
    found = []
    for (job, data), cells in winners.groupby(["job", "data"], sort=False):
        told = [
            f"{name} {'; '.join(map(_margin, shown.to_dict('records')))}"
            for verdict, name in ((IFT, "IFT is better at"), (RIVAL, "a rival is better at"))
            if len(shown := cells[cells["verdict"] == verdict])
        ]
        undecided = cells[cells["verdict"] == OPEN]
        if len(undecided):
            lowest = undecided["winner"].value_counts()
            who = ", ".join(f"{arm} in {count}" for arm, count in lowest.items())
            told.append(
                f"nothing is shown in {len(undecided)} of {format_count(len(cells), 'cell')}, "
                f"where the lowest mean error is that of {who}"
            )
        sentence = capitalise(f"{job} on {data}: {'. '.join(map(capitalise, told))}.")
        found.append(Finding(f"{job} on {data}", Verdict.NOTE, sentence))
    return found


def _margin(cell: dict[Any, Any]) -> str:
    """Return what was decided in a cell: "noise 0.5, 200 clean, by 1.2 points [0.4, 2.0] ..."."""
    return (
        f"noise {cell['noise']:g}, {cell['clean']:,} clean, by {difference_text(cell)} "
        f"({cell['reference']} {cell['reference_error']:.4f}, "
        f"{cell['rival']} {cell['rival_error']:.4f})"
    )


def difference_text(cell: dict[Any, Any]) -> str:
    """Return "1.2 points [0.4, 2.0]": by how much the better of two arms is better."""
    ends = sorted(_POINTS * abs(cell[end]) for end in ("low", "high"))
    return f"{_POINTS * abs(cell['difference']):.1f} points [{ends[0]:.1f}, {ends[1]:.1f}]"


def _resolution(winners: pd.DataFrame) -> Finding:
    """Say how small a difference can be that these seeds show: "not shown" is not "none"."""
    reach = float(((winners["high"] - winners["low"]) / 2.0).median())
    seeds = _range(winners["seeds"], "g")
    if int(winners["seeds"].min()) < _LEAST_PAIRS or not math.isfinite(reach):
        said = (
            f"With {seeds} seed{'s' * (seeds != '1')} nothing can be shown everywhere: a verdict "
            f"takes {_LEAST_PAIRS}."
        )
    else:
        said = (
            f"With {seeds} seeds the interval of the difference reaches {_POINTS * reach:.1f} "
            "points to either side in the median cell: where neither is shown, there may be a "
            "difference of that size."
        )
    return Finding("what can be seen", Verdict.NOTE, said)


def middle(values: Sequence[float], value: float) -> bool:
    """Return whether a value is neither the least nor the largest of three or more.

    Example:
        >>> from ift_tune.studies.worth_findings import middle
        >>> [middle((50, 200, 1000), clean) for clean in (50, 200, 1000)]
        [False, True, False]
    """
    return len(values) < 3 or min(values) < value < max(values)
