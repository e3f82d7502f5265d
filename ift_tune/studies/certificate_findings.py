"""What a certificate says: slope, R² and rank correlation with intervals, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ift_tune.base.files import write_table
from ift_tune.base.statistics import Interval, Relation, relation
from ift_tune.studies.writing import Finding, Verdict

if TYPE_CHECKING:
    from torch import Tensor

CERTIFICATE = "certificate"
"""Of the files in a run directory, and of the table's attribute with what it says."""

ALL = "all"
HEADLINE = "search"
"""The split whose loss decides."""

NEAR = 1e-3
"""Of the training loss: what one more step downhill may take off at most."""

NOISE = 0.5
"""Of the retrained changes: the largest part that may be retraining's own noise."""

SLOPES = (0.5, 2.0)
"""Where the slope of retrained by predicted changes has to be: right by a factor of two."""


@dataclass(frozen=True)
class Certificate:
    """What was measured around the λ that a run has found.

    Attributes:
        table: A row for each displaced λ and split: what was predicted, and what retraining did.
        relations: Of retrained to predicted changes of the search loss, by kind of displacement
            and for ``"all"``; with ``", longer series"`` after it, of the longer series.
        facts: Inner steps, how far from a minimum, metasmoothness, noise, and losses at λ itself.
        finding: The verdict in one sentence.
    """

    table: pd.DataFrame
    relations: Mapping[str, Relation]
    facts: Mapping[str, float]
    finding: Finding

    @property
    def holds(self) -> bool:
        """Whether the hypergradient predicts what retraining does, in order and size."""
        return self.finding.verdict is Verdict.CONFIRMED

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; what is not known is None."""
        return {
            "verdict": self.finding.verdict.value,
            "sentence": self.finding.sentence,
            "relations": {
                kind: {
                    name: [_known(value) for value in getattr(found, name)]
                    for name in found._fields
                }
                for kind, found in self.relations.items()
            },
            "facts": {name: _known(value) for name, value in self.facts.items()},
        }

    def save(self, directory: Path) -> None:
        """Write the table into a run directory, as CSV and parquet; parquet keeps what it says."""
        table = self.table.copy()
        table.attrs[CERTIFICATE] = self.as_dict()
        write_table(directory / CERTIFICATE, table)

    def lines(self) -> list[str]:
        """Return the numbers, a line for each kind of displacement, and the facts."""
        found = [f"{kind}: {describe(rel)}" for kind, rel in self.relations.items()]
        facts = self.facts
        found.append(
            f"retraining's own noise is {100.0 * facts['noise']:.0f} % of the retrained changes; "
            f"metasmoothness {facts['metasmoothness']:.2f} (1 is smooth, 0 is noise)"
        )
        return found


def describe(found: Relation) -> str:
    """Return a relation in words."""
    parts = (("slope", found.slope), ("R²", found.r2), ("rank correlation", found.rank))
    return ", ".join(f"{name} {_interval(value)}" for name, value in parts)


def _interval(value: Interval) -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def metasmoothness(base: Tensor, there: Tensor, further: Tensor) -> float:
    """Return how far the trained weights go on in the direction in which they began to move.

    The empirical metasmoothness of Engstrom et al. 2025 (arXiv 2503.13751): of the weights at λ,
    λ + h·v and λ + 2h·v, the share that move with the same sign in both steps less that with
    opposite signs, each weighted by how far it has moved in all. 1 where the trained weights are a
    smooth function of λ, about 0 where they are noise.

    Args:
        base: All weights as one vector, trained at λ.
        there: Trained at λ + h·v.
        further: Trained at λ + 2h·v.

    Example:
        >>> import torch
        >>> from ift_tune.studies.certificate_findings import metasmoothness
        >>> ramp = torch.tensor([1.0, -2.0])
        >>> metasmoothness(0 * ramp, ramp, 2 * ramp)
        1.0
    """
    first, second = (there - base).double(), (further - there).double()
    moved = (further - base).double().abs()
    total = float(moved.sum())
    if total == 0.0:
        return math.nan
    return float((first.sign() * second.sign() * moved).sum()) / total


def judge(table: pd.DataFrame, facts: Mapping[str, float]) -> Certificate:
    """Return what a table of displaced λ says.

    Args:
        table: A row for each displacement and split.
        facts: What else was measured.
    """
    headline = table[table["split"] == HEADLINE]
    relations: dict[str, Relation] = {}
    for name, label in (("predicted", ""), ("predicted_longer", ", longer series")):
        if name not in table:
            continue
        for kind in (ALL, *headline["kind"].unique()):
            rows = headline if kind == ALL else headline[headline["kind"] == kind]
            pair = rows[name].to_numpy(float), rows["retrained"].to_numpy(float)
            relations[f"{kind}{label}"] = relation(*pair)
    repeated = headline.dropna(subset=["again"])
    spread = _size(repeated["retrained"])
    noise = _size(repeated["retrained"] - repeated["again"]) / spread if spread else math.nan
    facts = {**facts, "noise": noise}
    return Certificate(table, relations, facts, _verdict(relations, facts))


def _size(values: pd.Series[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else math.nan


def _verdict(relations: Mapping[str, Relation], facts: Mapping[str, float]) -> Finding:
    every = relations[ALL]
    numbers = describe(every)
    no = "the hypergradient does not predict what retraining does"
    if not facts["gain"] <= NEAR:
        return _finding(
            Verdict.CONTRADICTED,
            f"{no}: too few inner steps, after {facts['inner_steps']:,.0f} of which one step "
            f"downhill would still lower the training loss by {100 * facts['gain']:.2g} % "
            f"({numbers}): train longer",
        )
    if not facts["noise"] <= NOISE:
        return _finding(
            Verdict.CONTRADICTED,
            f"{no}: retraining's own noise (order of batches, dropout, length) is "
            f"{100 * facts['noise']:.0f} % of what it changes ({numbers})",
        )
    if not every.rank.low > 0.0:
        return _finding(Verdict.CONTRADICTED, f"{no}: not even the order is right ({numbers})")
    low, high = SLOPES
    if not (every.slope.low >= low and every.slope.high <= high and every.r2.mean >= 0.5):
        longer = relations.get(f"{ALL}, longer series")
        more = "" if longer is None else f"; of a longer series: {describe(longer)}"
        return _finding(
            Verdict.MIXED,
            f"the hypergradient predicts the order of what retraining does, not its size "
            f"({numbers}{more})",
        )
    return _finding(
        Verdict.CONFIRMED, f"the hypergradient predicts what retraining does ({numbers})"
    )


def _finding(verdict: Verdict, sentence: str) -> Finding:
    return Finding("certificate", verdict, sentence)
