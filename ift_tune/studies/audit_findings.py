"""What an audit comes to: how well each ranking finds the wrong labels, and how stable it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

AUDIT = "audit"
"""Attribute of an audit's table, stem of its files, and their folder in a run directory."""

Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ranking:
    """One way to rank training examples by how suspect they are.

    Attributes:
        name: In the tables.
        words: What it is, for readers.
        scores: Of each example, the most suspect highest; NaN where it is not known.
        flags: Which it takes to be wrong; None where it only ranks.
        cost: Gradient-equivalents spent on it, beyond what the run had spent.
    """

    name: str
    words: str
    scores: Numbers
    flags: Flags | None
    cost: float

    def top(self, k: int) -> npt.NDArray[np.int64]:
        """Return the k most suspect examples; of equal ones the first, the unknown last."""
        known = np.where(np.isnan(self.scores), -np.inf, self.scores)
        return np.argsort(-known, kind="stable")[:k]


def compared(rankings: Sequence[Ranking], wrong: Flags | None, top: int) -> pd.DataFrame:
    """Return a row for each ranking: its cost, and how well it finds what is wrong.

    Args:
        rankings: In the order of the rows.
        wrong: Which labels are wrong; None where nobody knows, which leaves these columns out.
        top: Examples that are looked at, of which the precision is.
    """
    rows: list[dict[str, Any]] = []
    for ranking in rankings:
        row: dict[str, Any] = {
            "ranking": ranking.name,
            "about": ranking.words,
            "gradient_equivalents": ranking.cost,
            "flagged": math.nan if ranking.flags is None else float(ranking.flags.sum()),
        }
        if wrong is not None:
            number = int(wrong.sum())
            row["auc"] = auc(ranking.scores, wrong)
            row["f1"] = math.nan if ranking.flags is None else f1(ranking.flags, wrong)
            row["precision_at_top"] = float(wrong[ranking.top(top)].mean())
            row["precision_at_wrong"] = (
                float(wrong[ranking.top(number)].mean()) if number else math.nan
            )
        rows.append(row)
    return pd.DataFrame(rows)


def auc(scores: Numbers, wrong: Flags) -> float:
    """Return the chance that a wrong label has a higher score than a right one, ties half.

    NaN where there are none of both; examples without a score are left out.

    Example:
        >>> import numpy as np
        >>> auc(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
        0.875
    """
    known = ~np.isnan(scores)
    ranks = pd.Series(scores[known]).rank().to_numpy()
    positive = wrong[known]
    count, rest = int(positive.sum()), int((~positive).sum())
    if not count or not rest:
        return math.nan
    return float((ranks[positive].sum() - count * (count + 1) / 2.0) / (count * rest))


def f1(flags: Flags, wrong: Flags) -> float:
    """Return 2·|flagged and wrong| / (|flagged| + |wrong|); NaN where both are empty."""
    total = int(flags.sum()) + int(wrong.sum())
    return 2.0 * int((flags & wrong).sum()) / total if total else math.nan


def overlap(rankings: Sequence[Ranking], top: int) -> float:
    """Return which share of their most suspect examples two runs have in common, over all pairs.

    NaN for one run.
    """
    chosen = [set(ranking.top(top).tolist()) for ranking in rankings]
    pairs = list(itertools.combinations(chosen, 2))
    if not pairs:
        return math.nan
    return float(np.mean([len(one & other) / top for one, other in pairs]))


def sentences(facts: Mapping[str, Any], rankings: pd.DataFrame) -> list[str]:
    """Return what the audit says, most important first."""
    found = []
    examples, top, runs = facts["examples"], facts["top"], facts["runs"]
    if "auc" in rankings:
        scores = ", ".join(
            f"{row['ranking']} {row['auc']:.3f}" for row in rankings.to_dict("records")
        )
        found.append(
            f"{facts['wrong']:,} of {examples:,} labels are known to be wrong; area under the ROC "
            f"curve of each ranking: {scores}."
        )
        own = rankings["auc"].iloc[0]
        if better := rankings["ranking"][rankings["auc"] > own].tolist():
            found.append(
                f"Here {' and '.join(better)} rank{'s' * (len(better) == 1)} better than "
                f"{rankings['ranking'].iloc[0]}."
            )
    if facts["unknown"]:
        found.append(
            f"{facts['unknown']:,} examples come in no batch of a pass over the training split, "
            "and are ranked last: let Splits.curvature be a loader of all, without drop_last."
        )
    more = "ask for more seeds by seeds=5 (--seeds 5)"
    if runs == 1:
        found.append(
            "There is one seed, so that no standard error over seeds is known, and no stability of "
            f"the order: {more}."
        )
        return found
    which = "seeds" if facts["over"] == "seeds" else "better trials, by their weights,"
    found.append(
        f"Of the {top} most suspect examples two of the {runs} {which} have "
        f"{100 * facts['overlap']:.0f} % in common; of chance orders it would be "
        f"{100 * top / examples:.0f} %."
    )
    if facts["over"] != "seeds":
        found.append(
            f"Standard errors are over the better half of the search's trials, {runs}, which "
            f"differ in their settings and have one seed: {more}."
        )
    return found
