"""The reference arm against each other one, over the seeds that both have."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from ift_tune.base.statistics import LEVEL, Interval, Paired, holm, paired
from ift_tune.compare.anytime import Trajectory

Key: TypeAlias = tuple[str, int]
"""Of a search: its arm and its seed."""


class Conclusion(enum.IntEnum):
    """What the comparison of the reference with another arm shows, from worse to better."""

    OTHER_BETTER = -1
    NO_EVIDENCE = 0
    REFERENCE_BETTER = 1


@dataclass(frozen=True)
class Reach:
    """How much cheaper the reference reaches what another arm found in the end.

    Attributes:
        ratio: Median over seeds of the other's cost over the reference's, a seed in which the
            reference does not reach it counting as 0; 0 if it fails in half of the seeds.
        reached: Seeds in which it reaches it.
        seeds: Seeds.
    """

    ratio: float
    reached: int
    seeds: int


@dataclass(frozen=True)
class Against:
    """The reference against another arm.

    Attributes:
        other: The other arm.
        ours: Mean retrained test metric of the reference over the common seeds.
        theirs: That of the other arm.
        test: Differences other − reference of it: above 0 the reference is better.
        p_holm: Its p-value, adjusted for the number of comparisons.
        reach: Cost to reach the other's best search value.
        we_lack: Seeds in which only the other arm found something.
        they_lack: Seeds in which only the reference did.
    """

    other: str
    ours: float
    theirs: float
    test: Paired
    p_holm: float
    reach: Reach
    we_lack: int = 0
    they_lack: int = 0

    @property
    def difference(self) -> Interval:
        """Mean of reference minus other with its interval: below 0 the reference is better."""
        d = self.test.difference
        # 0 − x and not −x: no minus sign before a zero.
        return Interval(0.0 - d.mean, 0.0 - d.high, 0.0 - d.low)

    @property
    def conclusion(self) -> Conclusion:
        """Which of the two arms is better, if there is evidence.

        Evidence takes a permutation test below `LEVEL` after Holm's correction, a bootstrap
        interval that is clear of 0, and something found in every seed in which the other arm
        found something.
        """
        low, high = self.test.difference.low, self.test.difference.high
        if self.p_holm >= LEVEL:
            return Conclusion.NO_EVIDENCE
        # An arm that fails on the hard seeds has a mean over the easy ones: that is no evidence.
        if low > 0.0 and not self.we_lack:
            return Conclusion.REFERENCE_BETTER
        if high < 0.0 and not self.they_lack:
            return Conclusion.OTHER_BETTER
        return Conclusion.NO_EVIDENCE


def compare_with(
    reference: str,
    others: Sequence[str],
    chosen: pd.DataFrame,
    trajectories: Mapping[Key, Trajectory],
) -> list[Against]:
    """Return the reference against each other arm.

    Args:
        reference: Its name.
        others: The others' names.
        chosen: A row for each search that found something: ``arm``, ``seed``, ``retrained``.
        trajectories: Of those searches.
    """
    wide = chosen.pivot(index="seed", columns="arm", values="retrained")
    common = [wide[[reference, other]].dropna() for other in others]
    tests = [
        paired((c[o] - c[reference]).to_numpy(float)) for o, c in zip(others, common, strict=True)
    ]
    adjusted = holm([test.p for test in tests])
    has = wide.notna()
    return [
        Against(
            other=other,
            ours=float(both[reference].mean()),
            theirs=float(both[other].mean()),
            test=test,
            p_holm=p,
            reach=_reach(trajectories, reference, other),
            we_lack=int((has[other] & ~has[reference]).sum()),
            they_lack=int((has[reference] & ~has[other]).sum()),
        )
        for other, both, test, p in zip(others, common, tests, adjusted, strict=True)
    ]


def _reach(trajectories: Mapping[Key, Trajectory], reference: str, other: str) -> Reach:
    """Return how much cheaper the reference reaches each seed's best of the other arm.

    By the search value, which both arms have at every evaluation; retrained values are too few.
    """
    seeds = [s for arm, s in trajectories if arm == other and (reference, s) in trajectories]
    ratios = []
    for seed in seeds:
        theirs = trajectories[other, seed]
        target = float(theirs.search[-1])
        # Infinitely dear where it is never reached: 0 times cheaper, and the median stays defined.
        own = trajectories[reference, seed].first_reaching(target)
        ratios.append(0.0 if np.isnan(own) else theirs.first_reaching(target) / own)
    reached = sum(ratio > 0.0 for ratio in ratios)
    return Reach(float(np.median(ratios)) if ratios else 0.0, reached, len(seeds))
