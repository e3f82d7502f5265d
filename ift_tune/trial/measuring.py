"""What a trial measures of its splits: what decides has to be finite, the rest may be empty."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ift_tune.base.direction import chosen_metric
from ift_tune.base.errors import NonFiniteError
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.splits import require_finite, val_test_gap

_log = logging.getLogger(__name__)


class Measuring:
    """Measures the search and the test split of a trial; of its retraining too.

    What is only reported and is not finite (the F1 of a class that nobody answers) is left empty,
    and said once.
    """

    def __init__(self, metric: str | None) -> None:
        """Take the search metric that decides; see `Trial`."""
        self._metric = metric
        self._said: set[str] = set()

    def evaluate(self, joint: JointOptimizer, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what both splits measure, and the gap to the validation metrics of the row.

        Raises:
            NonFiniteError: If what decides is infinite or NaN, or the weights are, at which an
                error may still be a number; what is not finite is named.
            UsageError: If the problem does not measure the metric.
        """
        searched = joint.evaluate("search", charge=True, finite=False)
        self._require(chosen_metric(self._metric, searched), searched, joint)
        found = self._finite(searched | joint.evaluate("test", finite=False))
        return found | {"val_test_gap": val_test_gap({**row, **found})}

    @staticmethod
    def _require(deciding: str, searched: dict[str, float], joint: JointOptimizer) -> None:
        if all(map(math.isfinite, searched.values())):
            return
        if not all(bool(w.isfinite().all()) for w in joint.problem.weights()):
            require_finite(searched)  # a plain training does not look at its losses
        if not math.isfinite(value := searched[deciding]):
            raise NonFiniteError(
                f"{deciding} is {value}, and it decides: let `evaluate` return a number where it "
                "is undefined, choose another metric, or lower `inner_lr` or `meta_lr` if it "
                "diverges"
            )

    def _finite(self, measured: Mapping[str, float]) -> dict[str, float | None]:
        """Return the numbers, None for one that is none: no earlier value shall stand for it."""
        wrong = {name: value for name, value in measured.items() if not math.isfinite(value)}
        if new := {name: value for name, value in wrong.items() if name not in self._said}:
            _log.warning(
                "%s: what is not finite is left empty, and decides nothing",
                ", ".join(f"{name} is {value}" for name, value in new.items()),
            )
            self._said |= new.keys()
        return {name: None if name in wrong else value for name, value in measured.items()}
