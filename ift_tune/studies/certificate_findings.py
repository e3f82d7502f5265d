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

NEAR = 1e-2
"""Of the training loss: what the last fifth of the training may change."""

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
            and for ``"all"``; with ``", longer solve"`` after it, of the longer solve.
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


_PLACES = {
    "gradient": "along the hypergradient itself",
    "random": "along random directions",
    "left out": "where examples are left out",
}
"""The kinds of displacement, in words."""


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
    for name, label in (("predicted", ""), ("predicted_longer", ", longer solve")):
        if name not in table:
            continue
        for kind in (ALL, *map(str, headline["kind"].unique())):
            rows = headline if kind == ALL else headline[headline["kind"] == kind]
            pair = rows[name].to_numpy(float), rows["retrained"].to_numpy(float)
            relations[f"{kind}{label}"] = relation(*pair)
    noise = {kind: _noise(rows) for kind, rows in headline.groupby(headline["kind"].astype(str))}
    facts = {**facts, "noise": _noise(headline)} | {f"noise, {k!s}": v for k, v in noise.items()}
    return Certificate(table, relations, facts, _verdict(relations, facts))


def _noise(rows: pd.DataFrame) -> float:
    """Return which part of the retrained changes differs in another training."""
    repeated = rows.dropna(subset=["again"])
    spread = _size(repeated["retrained"])
    return _size(repeated["retrained"] - repeated["again"]) / spread if spread else math.nan


def _size(values: pd.Series[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else math.nan


def _verdict(relations: Mapping[str, Relation], facts: Mapping[str, float]) -> Finding:
    """Return the verdict: each kind of displacement has to agree, or it is named."""
    no = "the hypergradient does not predict what retraining does"
    if not facts["gain"] <= NEAR:
        return _finding(
            Verdict.CONTRADICTED,
            f"{no}: retraining ends before the minimum, the last fifth of its "
            f"{facts['inner_steps']:,.0f} inner steps changed the training loss by "
            f"{100 * facts['gain']:.2g} % ({describe(relations[ALL])}): take more inner steps, "
            "or less dropout",
        )
    if not facts["noise"] <= NOISE:
        return _finding(
            Verdict.CONTRADICTED,
            f"{no}: another training (other batches and masks, a quarter longer) differs by "
            f"{100 * facts['noise']:.0f} % of what is to be predicted, which explains it "
            f"({describe(relations[ALL])}): less dropout, larger batches or more inner steps",
        )
    kinds = {kind: found for kind, found in relations.items() if kind in _PLACES}
    for kind, found in kinds.items():
        if not found.rank.low > 0.0:
            return _finding(
                Verdict.CONTRADICTED,
                f"{no}: {_PLACES[kind]} not even the order is right ({describe(found)})"
                f"{_longer(relations, kind)}",
            )
    low, high = SLOPES
    for kind, found in kinds.items():
        if not (found.slope.low >= low and found.slope.high <= high and found.r2.mean >= 0.5):
            return _finding(
                Verdict.MIXED,
                "the hypergradient predicts the order of what retraining does, not its size: "
                f"{_PLACES[kind]} {describe(found)}{_longer(relations, kind)}",
            )
    return _finding(
        Verdict.CONFIRMED,
        f"the hypergradient predicts what retraining does ({describe(relations[ALL])})",
    )


def _longer(relations: Mapping[str, Relation], kind: str) -> str:
    """Return what a longer solve predicts: whether the inverse is to blame."""
    longer = relations.get(f"{kind}, longer solve")
    return "" if longer is None else f"; with a longer solve {describe(longer)}"


def _finding(verdict: Verdict, sentence: str) -> Finding:
    return Finding("certificate", verdict, sentence)
