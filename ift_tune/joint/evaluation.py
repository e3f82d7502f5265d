"""What is measured of a run: metrics over a split, bounds of a cost, health of a hypergradient."""

from __future__ import annotations

import contextlib
import math

import torch

from ift_tune.base.errors import NonFiniteError, UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.base.status import HEALTH_COLUMNS as HEALTH_COLUMNS
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.vectors import norm
from ift_tune.problem.batches import Batch, batch_size, once_through, to_device
from ift_tune.problem.losses import evaluating
from ift_tune.problem.problem import BilevelProblem


class Evaluator:
    """Metrics and sizes of a problem's splits.

    The random numbers are those of the run's stream, from a copy of it: how often one looks does
    not change what is trained, and a resumed run measures the same.
    """

    def __init__(self, problem: BilevelProblem, random: RandomStream, device: torch.device) -> None:
        """Measure `problem` with the numbers of `random`."""
        self._problem, self._random, self._device = problem, random, device
        self._batch_sizes: dict[str, int] = {}

    def evaluate(self, split: str) -> tuple[dict[str, float], int]:
        """Return the metrics of a split, means over examples, and the number of examples.

        Raises:
            NonFiniteError: If a metric is infinite or NaN.
            UsageError: If the split is empty.
        """
        totals: dict[str, float] = {}
        examples = 0
        with self._random.aside(), torch.no_grad(), evaluating(self._problem.model):
            for batch in once_through(getattr(self._problem.splits, split)):
                size = batch_size(batch)
                examples += size  # the mean is over examples: a last batch may be smaller
                for name, value in self._problem.metrics(to_device(batch, self._device)).items():
                    totals[name] = totals.get(name, 0.0) + float(value) * size
        if examples == 0:
            raise UsageError(f"the {split} loader yields no batch")
        means = {f"{split}_{name}": total / examples for name, total in totals.items()}
        return require_finite(means), examples

    def batch_metrics(self, train_batch: Batch, val_batch: Batch) -> dict[str, float]:
        """Return the metrics other than the loss on two batches, at the present weights."""
        # Who measures nothing but the validation loss is spared two forward passes a step.
        if type(self._problem).metrics is BilevelProblem.metrics:
            return {}
        found: dict[str, float] = {}
        with torch.no_grad(), evaluating(self._problem.model):
            for split, batch in (("train", train_batch), ("val", val_batch)):
                values = self._problem.metrics(batch)
                found |= {f"{split}_{k}": float(v) for k, v in values.items() if k != "loss"}
        return found

    def count_examples(self, split: str) -> int:
        """Return the number of examples in one pass over a split."""
        with self._random.aside():
            loader = getattr(self._problem.splits, split)
            return sum(batch_size(batch) for batch in once_through(loader))

    def first_batch(self, split: str) -> int:
        """Return the number of examples in the first batch of a split."""
        if split not in self._batch_sizes:
            batches = once_through(getattr(self._problem.splits, split))
            with self._random.aside(), contextlib.closing(batches):
                self._batch_sizes[split] = batch_size(next(batches))
        return self._batch_sizes[split]


def require_finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics.

    Raises:
        NonFiniteError: If one is infinite or NaN; it is named.
    """
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        raise NonFiniteError(
            f"{', '.join(f'{k} is {v}' for k, v in wrong.items())}. {SolveStatus.NONFINITE.advice}"
        )
    return metrics


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
