"""Room for an outer step: parts of its batches that keep to a budget, and smaller ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.implicit.hypergradient import WarmStart, solve
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.memory import (
    OUT_OF_MEMORY,
    fit_micro_batch,
    halved,
    held_bytes,
    separable_losses,
)
from ift_tune.joint.optimizers import Descent
from ift_tune.problem.batches import Batch
from ift_tune.problem.losses import linearise_problem
from ift_tune.problem.micro_batches import MicroBatch, rows_of, slice_of
from ift_tune.problem.problem import BilevelProblem

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Room:
    """In which parts an outer step takes its batches.

    Attributes:
        micro_batch: The parts; None for whole batches.
    """

    def __init__(self, problem: BilevelProblem, config: MetaConfig, inner: Descent) -> None:
        """Know of no limit yet.

        Args:
            problem: Whose batches they are.
            config: With a memory budget or without.
            inner: The optimiser of the weights.
        """
        self._problem, self._config, self._inner = problem, config, inner
        self._device = problem.weights()[0].device
        self.micro_batch: MicroBatch | None = None
        self._fitted = config.memory_budget is None
        self._free: tuple[bool, bool] | None = None

    @property
    def runs_again(self) -> bool:
        """Whether each exact product computes its gradient again, or may come to."""
        exact = self._config.products == "exact"
        return exact and (self.micro_batch is not None or not self._fitted)

    @property
    def runs_anew(self) -> bool:
        """Whether no graph of the training loss is in memory, or may come not to be."""
        return self._config.products == "difference" or self.runs_again

    def found(
        self,
        take: Callable[[], Result],
        train_batch: Batch,
        val_batch: Batch,
        outer: Descent,
        warm: WarmStart,
    ) -> Result:
        """Return what an action on two batches returns, in smaller parts if memory runs out.

        Args:
            take: Linearises the problem in the parts that are `micro_batch` by then.
            train_batch: Of the training loss.
            val_batch: Of the validation loss.
            outer: The optimiser of λ.
            warm: What the last solve has left.
        """
        if not self._fitted:
            self._fit(train_batch, val_batch, outer, warm)
        if self._config.products == "difference" or self.micro_batch is not None:
            for weight in self._problem.weights():
                weight.grad = None  # of the last inner step: nobody needs it any more
        while True:
            before = GlobalState(self._device)
            try:
                return take()
            except OUT_OF_MEMORY as error:
                kind, text = type(error), str(error)
            # Outside of the clause, where the error no longer holds what its frames had made.
            before.restore()
            smaller = self._smaller(train_batch, val_batch)
            if smaller is None:
                raise kind(text)
            _log.warning(
                "memory ran out in an outer step: it is taken again in micro-batches of %s "
                "training and %s validation examples, and so are those to come",
                smaller.train or "all",
                smaller.val or "all",
            )
            self.micro_batch = smaller
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def first(self, train_batch: Batch, val_batch: Batch) -> tuple[Batch, Batch]:
        """Return the first parts of two batches."""
        parts = self.micro_batch or MicroBatch()
        pairs = ((train_batch, parts.train), (val_batch, parts.val))
        one, two = (b if size is None else slice_of(b, 0, size) for b, size in pairs)
        return one, two

    def state(self) -> list[Any] | None:
        """Return the parts as plain values: in others the sums are the same but for rounding."""
        parts = self.micro_batch
        return [self._fitted, None if parts is None else [parts.train, parts.val]]

    def load_state(self, state: list[Any] | None) -> None:
        """Go on with the parts of a saved state."""
        if state is not None:
            fitted, parts = state
            self._fitted = self._config.memory_budget is None or bool(fitted)
            self.micro_batch = None if parts is None else MicroBatch(*parts)

    def _fit(self, train_batch: Batch, val_batch: Batch, outer: Descent, warm: WarmStart) -> None:
        """Find the parts that keep to the budget."""
        config, problem = self._config, self._problem

        def take(one: Batch, two: Batch, parts: MicroBatch | None) -> object:
            linearisation = linearise_problem(
                problem,
                one,
                two,
                gauss_newton=config.curvature == "gauss_newton",
                products=config.products,
                micro_batch=parts,
            )
            found = solve(linearisation, config.inverse, warm, absent=set(linearisation.hypers))
            kept.add(int(config.warm_start) + int(found.warm.eigenpair is not None))
            return None

        kept = {0}  # vectors, for the next solve
        budget = config.memory_budget
        for weight in problem.weights():
            weight.grad = None
        with drawn_again(GlobalState(self._device), self._device):
            self.micro_batch = fit_micro_batch(
                problem,
                train_batch,
                val_batch,
                take,
                budget=int(budget or 0),
                held=lambda: held_bytes(problem, self._inner, outer, max(kept)),
            )
        self._fitted = True
        if self.micro_batch is not None:
            _log.info(
                "memory_budget of %s bytes: outer steps in micro-batches of %s training and %s "
                "validation examples",
                f"{budget:,}",
                self.micro_batch.train or "all",
                self.micro_batch.val or "all",
            )

    def _smaller(self, train_batch: Batch, val_batch: Batch) -> MicroBatch | None:
        """Return micro-batches of half the size; None where there are none."""
        try:
            sizes = rows_of(train_batch), rows_of(val_batch)
            if self._free is None:
                with drawn_again(GlobalState(self._device), self._device):
                    self._free = separable_losses(self._problem, train_batch, val_batch)
            return halved(self.micro_batch, sizes, self._free)
        except (UsageError, ValueError):
            return None
