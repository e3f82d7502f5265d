"""Room for an outer step: parts of its batches that keep to a budget, and smaller ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.hypergradient import WarmStart, solve
from ift_tune.implicit.vectors import Tensors, count
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.live_bytes import measured_peak
from ift_tune.joint.memory import (
    OUT_OF_MEMORY,
    fit_micro_batch,
    halved,
    held_bytes,
    separable_losses,
)
from ift_tune.joint.optimizers import Descent
from ift_tune.problem.batches import Batch, tensors_of
from ift_tune.problem.cutting import slice_of
from ift_tune.problem.losses import linearise_problem
from ift_tune.problem.micro_batches import MicroBatch, random_parts, rows_of
from ift_tune.problem.problem import BilevelProblem

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Room:
    """In which parts an outer step takes its batches.

    Attributes:
        micro_batch: The parts; None for whole batches.
    """

    def __init__(
        self, problem: BilevelProblem, config: MetaConfig, inner: Descent, kept: Tensors = ()
    ) -> None:
        """Know of no limit yet.

        Args:
            problem: Whose batches they are.
            config: With a memory budget or without.
            inner: The optimiser of the weights.
            kept: Tensors that are there all the time beside those of problem and optimisers.
        """
        self._problem, self._config, self._inner, self._kept = problem, config, inner, list(kept)
        self._device = problem.weights()[0].device
        self.micro_batch: MicroBatch | None = None
        self._fitted = config.memory_budget is None
        self._free: tuple[bool, bool] | None = None
        self._taken: dict[str, int] = {}  # outer steps within a budget, by their kind

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
        *,
        usual: bool = True,
    ) -> Result:
        """Return what an action on two batches returns, in smaller parts if memory runs out.

        Args:
            take: Linearises the problem in the parts that are `micro_batch` by then.
            train_batch: Of the training loss.
            val_batch: Of the validation loss.
            outer: The optimiser of λ.
            warm: What the last solve has left.
            usual: Whether it takes what later steps take: not so with the check at the start.
        """
        if not self._fitted:
            self._fit(train_batch, val_batch, outer, warm)
        for weight in self._problem.weights():
            weight.grad = None  # of the last inner step: nobody needs it any more
        while True:
            before = GlobalState(self._device)
            try:
                if not usual:
                    return take()
                return self._watched(take, train_batch, val_batch, outer, warm)
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

    def _watched(
        self,
        take: Callable[[], Result],
        train_batch: Batch,
        val_batch: Batch,
        outer: Descent,
        warm: WarmStart,
    ) -> Result:
        """Return what an action returns; where it goes beyond the budget, the next are in less.

        What a step begins with decides what it takes, so that the first of each kind is looked at,
        and then ever fewer: the second, the fourth, the eighth, ...
        """
        budget = self._config.memory_budget
        pair = warm.eigenpair
        kind = f"solution {warm.solution is not None}, " + (
            "no eigenpair" if pair is None else f"eigenvector {bool(pair.vector)}"
        )
        if budget is None:
            return take()
        number = self._taken[kind] = self._taken.get(kind, 0) + 1
        if number & (number - 1):
            return take()
        with measured_peak(self._device) as peak:
            result = take()
        left = [*(warm.solution or []), *([] if pair is None else pair.vector)]
        taken = peak.bytes + self._held(outer, (train_batch, val_batch), left)
        if taken <= int(budget):
            return result
        smaller = self._smaller(train_batch, val_batch)
        if smaller is None:
            _log.warning(
                "an outer step has taken %s bytes, more than memory_budget, and cannot be taken in "
                "smaller parts",
                f"{taken:,}",
            )
            return result
        _log.warning(
            "an outer step has taken %s bytes, more than memory_budget: those to come are in "
            "micro-batches of %s training and %s validation examples",
            f"{taken:,}",
            smaller.train or "all",
            smaller.val or "all",
        )
        self.micro_batch, self._taken = smaller, {}
        return result

    def _held(self, outer: Descent, batches: Batch, left: Tensors = ()) -> int:
        """Return the bytes that are there all along, with its batches and what a solve has left."""
        kept = [*self._kept, *tensors_of(batches), *left]
        return held_bytes(self._problem, self._inner, outer, kept)

    def first(self, train_batch: Batch, val_batch: Batch) -> tuple[Batch, Batch]:
        """Return the first parts of two batches."""
        parts = self.micro_batch or MicroBatch()
        pairs = ((train_batch, parts.train), (val_batch, parts.val))
        one, two = (b if size is None else slice_of(b, 0, size) for b, size in pairs)
        return one, two

    def state(self) -> list[Any] | None:
        """Return the parts as plain values: in others the sums are the same but for rounding."""
        parts = self.micro_batch
        sizes = None if parts is None else [parts.train, parts.val]
        return [self._fitted, sizes, dict(self._taken)]

    def load_state(self, state: list[Any] | None) -> None:
        """Go on with the parts of a saved state."""
        if state is not None:
            fitted, parts, *taken = state
            self._taken = dict(*taken)  # older checkpoints have none
            self._fitted = self._config.memory_budget is None or bool(fitted)
            self.micro_batch = None if parts is None else MicroBatch(*parts)

    def _fit(self, train_batch: Batch, val_batch: Batch, outer: Descent, warm: WarmStart) -> None:
        """Find the parts that keep to the budget."""
        config, problem = self._config, self._problem

        def take(one: Batch, two: Batch, parts: MicroBatch | None) -> object:
            number = config.signal_parts if config.signal_every else 0
            linearisation = linearise_problem(
                problem,
                one,
                two,
                gauss_newton=config.curvature == "gauss_newton",
                products=config.products,
                micro_batch=parts,
                val_parts=random_parts(two, number, 0) if number else [],
            )
            absent = set(linearisation.hypers)
            left = solve(linearisation, config.inverse, warm, absent).warm
            # And as a later step is taken, which begins with all that an earlier one may leave.
            if left.solution is not None and (later := self._later(left)) is not None:
                solve(linearisation, config.inverse, later, absent)
            return None

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
                held=lambda: self._held(outer, (train_batch, val_batch)),
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

    def _later(self, left: WarmStart) -> WarmStart | None:
        """Return the most that a step may leave for the next, given what one has left."""
        config, solution = self._config, left.solution or []
        weights, pair = count(solution), left.eigenpair
        most = [config.inverse.max_hvps(weights, previous) for previous in (False, True)]
        if pair is not None or most[0] != most[1]:
            # The estimate may be a number now, and have a vector where the curvature is otherwise.
            vector = [x.clone() for x in solution]
            pair = Eigenpair(1.0 if pair is None else pair.value, vector)
        if pair is None and not config.warm_start:
            return None
        return WarmStart(solution if config.warm_start else None, pair)

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
