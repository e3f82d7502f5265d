"""Is this hypergradient to be trusted: the health columns of the tables."""

from __future__ import annotations

import math

from ift_tune.base.columns import HEALTH_COLUMNS as HEALTH_COLUMNS
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.vectors import norm


def health(result: Hypergradient) -> dict[str, float]:
    """Return the numeric health columns of a hypergradient; what is not known is left out."""
    stats = result.stats
    columns = {
        "negative_curvature": float(result.status is SolveStatus.NEGATIVE_CURVATURE),
        "hypergradient_norm": float(norm(result.grads)),
        "skipped": float(not result.usable),
    }
    if stats.relative_residual is not None:
        columns["relative_residual"] = stats.relative_residual
    if stats.alpha is not None and stats.largest_eigenvalue is not None:
        columns["alpha_lambda_max"] = stats.alpha * stats.largest_eigenvalue
    return {key: value for key, value in columns.items() if math.isfinite(value)}


def val_test_gap(metrics: dict[str, float]) -> float | None:
    """Return test minus validation error, or loss; None where either is not measured."""
    for kind in ("error", "loss"):
        if f"val_{kind}" in metrics and f"test_{kind}" in metrics:
            return metrics[f"test_{kind}"] - metrics[f"val_{kind}"]
    return None
