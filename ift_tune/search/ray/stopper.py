"""Stops trials whose hypergradients are worth nothing, before the budget does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from ray import tune

from ift_tune.errors import UsageError
from ift_tune.search.ray.session import OBJECTIVE
from ift_tune.types import Status


class DivergenceStopper(tune.Stopper):
    """Stops a trial after so many results in a row that show divergence.

    A result shows it if its ``solve_status`` is one of `statuses`, or its objective is not finite.
    (A trial whose λ could not be moved five times in a row ends by itself.)
    """

    def __init__(
        self,
        patience: int = 3,
        *,
        statuses: Collection[Status] = (Status.DIVERGED, Status.NONFINITE),
        metric: str = OBJECTIVE,
    ) -> None:
        """Say what divergence is.

        Args:
            patience: Results in a row, at least 1.
            statuses: Of the linear solve.
            metric: Key of the value that has to be finite.

        Raises:
            UsageError: If `patience` is below 1.
        """
        if patience < 1:
            raise UsageError(f"patience must be at least 1, got {patience}")
        self._patience, self._metric = patience, metric
        self._statuses = frozenset(status.value for status in statuses)
        self._in_a_row: Counter[str] = Counter()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether to stop the trial."""
        bad = result.get("solve_status") in self._statuses
        if bad or not math.isfinite(result.get(self._metric, 0.0)):
            self._in_a_row[trial_id] += 1
        else:
            self._in_a_row[trial_id] = 0
        return self._in_a_row[trial_id] >= self._patience

    def stop_all(self) -> bool:
        """Never stop the whole search."""
        return False
