"""What is read of the splits: numbers and sizes for measuring, walks for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ift_tune.base.errors import NonFiniteError, UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.reading import Later, together
from ift_tune.problem.batches import Batch, to_device
from ift_tune.problem.evaluation import SplitBatches, measured, without_graphs
from ift_tune.problem.loaders import Cursor, first_batch, once_through
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.problem.sizes import as_size


class Evaluator:
    """Metrics and sizes of a problem's splits.

    The random numbers are those of the run's stream, from a copy of it: how often one looks does
    not change what is trained, and a resumed run measures the same.
    """

    def __init__(self, problem: BilevelProblem, random: RandomStream, device: torch.device) -> None:
        """Measure `problem` with the numbers of `random`."""
        self._problem, self._random, self._device = problem, random, device
        self._batch_sizes: dict[str, float] = {}

    def evaluate(self, split: str) -> tuple[dict[str, float], float]:
        """Return the numbers of a split and the number of examples.

        Raises:
            UsageError: If the split is empty, or what the problem returns is no number.
        """
        loader = getattr(self._problem.splits, split)
        batches = SplitBatches(split, loader, self._device, self._size)
        with self._random.aside(), evaluating(self._problem.model):
            numbers = measured(lambda: self._problem.evaluate(batches))
        if not numbers:
            raise UsageError(
                f"nothing is measured on the {split} split: metrics(batch) must return a number, "
                f"and batch_size(batch) count some examples, got {batches.examples} examples"
            )
        found = {f"{split}_{name}": value for name, value in numbers.items()}
        return found, batches.examples

    def batch_metrics(self, train_batch: Batch, val_batch: Batch) -> Later[dict[str, float]]:
        """Return the metrics other than the loss on two batches, at the present weights.

        What a single batch cannot tell, as the AUC of one class, is not finite and left out.
        """
        problem = self._problem
        if not measures_batches(problem):
            return Later.known({})
        own = type(problem).evaluate is not BilevelProblem.evaluate

        def look(batch: Batch) -> Later[dict[str, float]]:
            if own:
                return Later.known(measured(partial(problem.evaluate, [batch])))
            return without_graphs(partial(problem.begin_evaluation, [batch]))

        def named(found: list[dict[str, float]]) -> dict[str, float]:
            return {
                f"{split}_{name}": value
                for split, numbers in zip(("train", "val"), found, strict=True)
                for name, value in numbers.items()
                if name != "loss" and math.isfinite(value)
            }

        with evaluating(problem.model):
            return together(look(train_batch), look(val_batch)).then(named)

    def count_examples(self, split: str) -> float:
        """Return the number of examples in one pass over a split."""
        with self._random.aside():
            loader = getattr(self._problem.splits, split)
            return sum(self._size(batch) for batch in once_through(loader))

    def first_batch(self, split: str) -> float:
        """Return the number of examples in the first batch of a split.

        Raises:
            UsageError: If there is none: no cost could be told from it.
        """
        if split not in self._batch_sizes:
            with self._random.aside():
                first = first_batch(split, getattr(self._problem.splits, split))
            size = self._size(first)
            if size == 0:
                raise UsageError(
                    f"the first batch of the {split} split must have examples for the cost to be "
                    "counted, got 0 from batch_size(batch)"
                )
            self._batch_sizes[split] = size
        return self._batch_sizes[split]

    def _size(self, batch: Batch) -> float:
        return as_size(self._problem.batch_size(batch))


def measures_batches(problem: BilevelProblem) -> bool:
    """Return whether the batches of an outer step are measured.

    Who measures nothing but the validation loss is spared two forward passes a step.
    """
    kind = type(problem)
    plain = kind.metrics is BilevelProblem.metrics and kind.evaluate is BilevelProblem.evaluate
    return not plain


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


def val_test_gap(metrics: Mapping[str, float | None]) -> float | None:
    """Return test minus validation error, or loss; None where either is not measured."""
    for kind in ("error", "loss"):
        if f"val_{kind}" in metrics and f"test_{kind}" in metrics:
            val, test = metrics[f"val_{kind}"], metrics[f"test_{kind}"]
            return None if val is None or test is None else test - val
    return None


class Walks:
    """An endless walk over each of the splits, with batches on the problem's device.

    Attributes:
        watch: Is shown each batch.
    """

    def __init__(self, splits: Splits, device: torch.device) -> None:
        """Begin all walks; none is taken yet."""
        self._device = device
        self.watch: Callable[[Batch], object] = lambda _batch: None
        # Search and test are never walked, but their generators' states are saved with the rest.
        self._cursors = {
            name: Cursor(name, loader, device)
            for name, loader in vars(splits).items()
            if loader is not None
        }
        self.curvature = "curvature" if "curvature" in self._cursors else "train"
        """The split whose batches an outer step takes for the training loss."""

    def next(self, split: str) -> Batch:
        """Return the next batch of a split."""
        batch = to_device(self._cursors[split].next(), self._device)
        self.watch(batch)
        return batch

    def close(self) -> None:
        """End the loaders' worker processes; a walk that goes on finds its place again."""
        for cursor in self._cursors.values():
            cursor.suspend()

    def state_dict(self) -> dict[str, Any]:
        """Return all positions."""
        return {name: cursor.state_dict() for name, cursor in self._cursors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to saved positions; leaves the global generators anywhere."""
        for name, cursor in self._cursors.items():
            cursor.load_state_dict(state[name])
