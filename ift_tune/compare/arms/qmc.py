"""Quasi-random search: points that fill the space more evenly than random ones do."""

from __future__ import annotations

from ift_tune.compare.arms.base import Arm, Style
from ift_tune.compare.arms.standard import BaselineTrials

ARMS = (
    # What random search is usually replaced by where trials run side by side, as it needs no
    # results to choose the next point (Bergstra and Bengio, JMLR 2012, section 5).
    Arm(
        "qmc",
        label="quasi-random search",
        phrase="quasi-random search",
        summary="quasi-random search: a scrambled Sobol' sequence",
        style=Style("#9c7a52", (8, 2, 2, 2), "p"),
        trials=BaselineTrials(),
        sampler="qmc",
    ),
)
