"""A problem's losses run again and again, in parts: for products that keep no graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.implicit.checkpoints import repeated_as_called
from ift_tune.implicit.differences import Sink, coarsest_rounding, is_compiled, reached_leaves
from ift_tune.implicit.double_backward import Kernels, safe_kernels
from ift_tune.implicit.micro_batches import Consume, accumulate_
from ift_tune.implicit.vectors import Tensors, fill_missing
from ift_tune.problem.batches import Batch
from ift_tune.problem.modes import (
    captured_outputs,
    evaluating,
    preserved_buffers,
    without_gradients,
)
from ift_tune.problem.normalisation import RunningStatistics
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_loss


class Part(NamedTuple):
    """A micro-batch, and its share of the examples of the batch that it is of."""

    batch: Batch
    share: float


class Centre(NamedTuple):
    """The training loss where it is linearised.

    Attributes:
        loss: Detached.
        reached: The identities of the leaf tensors that it depends on.
        rounding: Machine epsilon of the least precise value on the way to it.
        by_statistics: What the validation gradient gains by running statistics, by weights and then
            by hyperparameters; None where that is nothing.
        kernels: Those that it was computed with.
        compiled: Whether code on the way is compiled.
    """

    loss: Tensor
    reached: set[int]
    rounding: float
    by_statistics: list[Tensor | None]
    kernels: Kernels
    compiled: bool


class TrainingPasses:
    """The training loss of an outer step, which can be run again on the same random numbers.

    Afterwards the model's buffers and the generators are as before.

    Attributes:
        parts: How many there are of the batch.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        parts: Sequence[Part],
        random: GlobalState,
        *,
        twice: bool = False,
    ) -> None:
        """Take the batch.

        Args:
            problem: At the weights and λ that it has when a pass is run.
            parts: Of the training batch.
            random: Where the random numbers of each pass begin.
            twice: Whether what is computed is to be differentiated twice.
        """
        self._problem, self._parts, self._random, self._twice = problem, parts, random, twice
        self.parts = len(parts)
        self._weights, self._hypers = problem.weights(), problem.hypers()
        self._device = self._weights[0].device

    def centre(self, slopes: Mapping[str, tuple[Tensor, Tensor]]) -> Centre:
        """Run the loss once, at the generators' present state, which goes on from there.

        Args:
            slopes: Of the validation loss by running statistics; see `RunningStatistics.pulled`.
        """
        model, inputs = self._problem.model, [*self._weights, *self._hypers]
        value = torch.zeros((), device=self._device)
        reached: set[int] = set()
        rounding, compiled, gained = 0.0, False, list[Tensor | None]([None] * len(inputs))
        with self._kernels():
            for batch, share in self._parts:
                statistics = RunningStatistics(model)
                with preserved_buffers(model):
                    with statistics.observed():
                        loss = as_loss(self._problem.train_loss(batch), "train_loss")
                    value = value.to(loss) + share * loss.detach()
                    reached |= reached_leaves(loss)
                    rounding = max(rounding, coarsest_rounding(loss, self._weights))
                    compiled |= is_compiled(loss)
                    pulled = statistics.pulled(slopes)
                    if pulled is not None and pulled.requires_grad:
                        found = torch.autograd.grad(share * pulled, inputs, allow_unused=True)
                        accumulate_(gained, found)
                del loss, statistics, pulled  # one part's graph ends before the next begins
            kernels = Kernels.in_force()
        return Centre(value, reached, rounding, gained, kernels, compiled)

    def run(
        self,
        consume: Consume,
        *,
        outputs: bool = False,
        severed: bool = False,
        graph: bool = True,
    ) -> None:
        """Compute each part's share of the loss and hand it on, one after the other.

        Args:
            consume: Given the share with its graph, and the model's outputs if they are asked for.
            outputs: Whether they are.
            severed: Whether they are leaf tensors, from which the loss goes on.
            graph: Whether autograd shall be able to follow the loss.
        """
        model = self._problem.model
        # What is consumed is differentiated inside, where an activation checkpoint runs again.
        with drawn_again(self._random, self._device), self._kernels():
            for batch, share in self._parts:
                capture: AbstractContextManager[list[Tensor]] = nullcontext([])
                if outputs:
                    capture = captured_outputs(model, severed=severed)
                with preserved_buffers(model):
                    with capture as found:
                        loss = as_loss(self._problem.train_loss(batch), "train_loss", graph=graph)
                    consume(loss if share == 1.0 else share * loss, found)
                del loss, found  # the graph of one part ends before that of the next begins

    def slope(self, inputs: Tensors) -> tuple[Tensor, list[Tensor | None]]:
        """Return L_T and ∂L_T/∂inputs at the present weights and λ, None where nothing is reached.

        Detached.
        """
        total: list[Tensor | None] = [None] * len(inputs)
        losses: list[Tensor] = []

        def consume(loss: Tensor, _outputs: list[Tensor]) -> None:
            losses.append(loss.detach())
            accumulate_(total, torch.autograd.grad(loss, list(inputs), allow_unused=True))

        wanted = {id(tensor) for tensor in inputs}
        with without_gradients([h for h in self._hypers if id(h) not in wanted]):
            self.run(consume)
        return torch.stack(losses).sum(), total

    def stream(self, inputs: Tensors, sink: Sink) -> None:
        """Give each gradient ∂L_T/∂inputs away as soon as it is there, so that none is kept.

        Args:
            inputs: Leaf tensors.
            sink: Given the number of an input and a part's gradient by it, which it must not keep.
        """

        def give(number: int, gradient: Tensor) -> Tensor:
            with torch.no_grad():
                dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
                sink(number, dense)
            # What autograd collects in its place takes no memory.
            return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(
                gradient.shape
            )

        def consume(loss: Tensor, _outputs: list[Tensor]) -> None:
            torch.autograd.grad(loss, list(inputs), allow_unused=True)

        wanted = {id(tensor) for tensor in inputs}
        with without_gradients([h for h in self._hypers if id(h) not in wanted]):
            # After the user's own hooks on these tensors, which so have changed what is given.
            handles = [t.register_hook(partial(give, i)) for i, t in enumerate(inputs)]  # type: ignore[no-untyped-call]
            try:
                self.run(consume)
            finally:
                for handle in handles:
                    handle.remove()

    def value(self) -> Tensor:
        """Return L_T at the present weights and λ."""
        losses: list[Tensor] = []
        with torch.no_grad():
            self.run(lambda loss, _outputs: losses.append(loss), graph=False)
        return torch.stack(losses).sum()

    def output_slopes(self) -> list[Tensor]:
        """Return ∂L_T/∂o for the model's outputs o, of each part of the batch."""
        slopes: list[Tensor] = []

        def consume(loss: Tensor, outputs: list[Tensor]) -> None:
            (slope,) = torch.autograd.grad(loss, outputs, allow_unused=True)
            slopes.append(torch.zeros_like(outputs[0]) if slope is None else slope)

        self.run(consume, outputs=True, severed=True)
        return slopes

    def pulled(self, slopes: Sequence[Tensor], inputs: Tensors) -> list[Tensor | None]:
        """Return Σ slopeᵀ·∂o/∂inputs over the parts of the batch."""
        total: list[Tensor | None] = [None] * len(inputs)
        remaining = iter(slopes)

        def consume(_loss: Tensor, outputs: list[Tensor]) -> None:
            found = torch.autograd.grad(
                outputs, list(inputs), grad_outputs=[next(remaining)], allow_unused=True
            )
            accumulate_(total, found)

        self.run(consume, outputs=True)
        return total

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._twice:
                stack.enter_context(safe_kernels(self._problem.model))
            else:
                roots = self._problem.model, self._problem.hyper
                stack.enter_context(repeated_as_called(*roots))
            yield


class Judged(NamedTuple):
    """A validation loss and its gradients, without a graph.

    Attributes:
        loss: Detached.
        by_weights: None where it reaches nothing.
        by_hypers: Likewise.
        by_statistics: By running means and variances, by the names of the means.
    """

    loss: Tensor
    by_weights: list[Tensor | None]
    by_hypers: list[Tensor | None]
    by_statistics: dict[str, tuple[Tensor, Tensor]]


def judge(
    problem: BilevelProblem, parts: Sequence[Part], weights: Tensors, hypers: Tensors
) -> Judged:
    """Return the validation loss in evaluation mode with its gradients, part by part.

    Args:
        problem: At its present weights and λ.
        parts: Of the validation batch.
        weights: What is differentiated by.
        hypers: Likewise.
    """
    model, statistics = problem.model, RunningStatistics(problem.model)
    inputs = [*weights, *hypers]
    total: list[Tensor | None] = [None] * len(inputs)
    by_statistics: dict[str, tuple[Tensor, Tensor]] = {}
    value = torch.zeros((), device=weights[0].device)
    with repeated_as_called(model, problem.hyper), evaluating(model), preserved_buffers(model):
        for batch, share in parts:
            with statistics.apart() as leaves:
                loss = as_loss(problem.val_loss(batch), "val_loss")
                loss = loss if share == 1.0 else share * loss
            flat = [leaf for pair in leaves.values() for leaf in pair]
            found = torch.autograd.grad(loss, [*inputs, *flat], allow_unused=True)
            accumulate_(total, found[: len(inputs)])
            slopes = iter(fill_missing(tuple(found[len(inputs) :]), flat))
            for name in leaves:
                mean, variance = next(slopes), next(slopes)
                before = by_statistics.get(name, (0.0, 0.0))
                by_statistics[name] = (before[0] + mean, before[1] + variance)
            value = value.to(loss) + loss.detach()
            del loss, found
    n = len(weights)
    return Judged(value, total[:n], total[n:], by_statistics)
