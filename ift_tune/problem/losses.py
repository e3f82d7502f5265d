"""A problem's losses as mathematics takes them: linearised, or as functions of explicit weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.implicit.checkpoints import kept_activations
from ift_tune.implicit.double_backward import Kernels, safe_kernels
from ift_tune.implicit.linearisation import Linearisation, linearise
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.process_group import active_group, summed, total
from ift_tune.implicit.vectors import Tensors, fill_missing, named
from ift_tune.problem.batches import Batch
from ift_tune.problem.evaluation import measured
from ift_tune.problem.micro_batches import MicroBatch, parts_of
from ift_tune.problem.modes import captured_outputs, evaluating, preserved_buffers
from ift_tune.problem.normalisation import RunningStatistics
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.repeated import linearise_again
from ift_tune.problem.returned import as_loss, as_penalty
from ift_tune.problem.shares import share_of


def linearise_problem(
    problem: BilevelProblem,
    train_batch: Batch,
    val_batch: Batch,
    *,
    gauss_newton: bool = False,
    penalty: Penalty | None = None,
    products: str = "exact",
    micro_batch: MicroBatch | None = None,
    val_parts: Sequence[Batch] = (),
) -> Linearisation:
    """Return a problem linearised at its present weights and λ.

    What trains, what checks and what studies all come by here, so that a problem is treated alike.
    The products are taken with the kernels of this call (see `Kernels`), whoever takes them.

    Args:
        problem: Its model is as before afterwards, its modes and buffers too.
        train_batch: Of the curvature loader, or of the training loader without one.
        val_batch: Of the validation loader.
        gauss_newton: Whether the Gauss-Newton matrix takes the Hessian's place.
        penalty: The problem's at its present λ, where it has been made already: what depends on λ
            alone is then not computed again.
        products: ``"exact"``, or ``"difference"``: by differences of gradients, on the kernels of
            training. The weights must stay as they are until the last of them is taken.
        micro_batch: In which parts batches are taken, so that the graph of one part alone is in
            memory; None for whole.
        val_parts: Further validation batches, whose gradients become `Linearisation.parts`. They
            draw no random numbers of the run.

    Raises:
        UsageError: If a loss has no graph, or the Gauss-Newton matrix is asked for and the training
            loss does not call the model once for one tensor.
        DoubleBackwardError: If an operation hides its curvature from autograd; it is named.
    """
    if products == "difference" or micro_batch is not None:
        sizes = micro_batch or MicroBatch()
        device = problem.weights()[0].device
        before = GlobalState(device)

        def again(batch: Batch) -> Linearisation:
            return linearise_again(
                problem,
                parts_of(problem, train_batch, sizes.train),
                parts_of(problem, batch, sizes.val),
                gauss_newton=gauss_newton,
                exact=products == "exact",
            )

        found, others = again(val_batch), []
        for part in val_parts:
            with drawn_again(before, device):
                made = again(part)
            others.append((made.vector, made.direct))
        return replace(found, parts=others)
    model = problem.model
    with safe_kernels(model):
        train_loss, val_loss, outputs, slopes = _losses(
            problem,
            train_batch,
            val_batch,
            captured_outputs(model) if gauss_newton else None,
            val_parts,
        )
        kernels = Kernels.in_force()
    # What stands in for a function is in the graphs by now. From here on only the kernels matter:
    # a mode that sees every function would be asked at each of the arithmetic below.
    with kernels.active():
        return linearise(
            train_loss,
            val_loss,
            model,
            problem.hyper,
            penalty=as_penalty(problem.penalty()) if penalty is None else penalty,
            outputs=outputs[0] if gauss_newton else None,
            parts=slopes,
        )


def outer_losses(
    problem: BilevelProblem, train_batch: Batch, val_batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return both losses as `linearise_problem` takes them."""
    with safe_kernels(problem.model):
        return _losses(problem, train_batch, val_batch)[:2]


def loss_values(problem: BilevelProblem, train_batch: Batch, val_batch: Batch) -> dict[str, float]:
    """Return the values of both losses of whole batches, as `linearise_problem` finds them."""

    def values() -> dict[str, Tensor]:
        with preserved_buffers(problem.model):
            train_loss = problem.train_loss(train_batch)
        with evaluating(problem.model), preserved_buffers(problem.model):
            return {"train_loss": train_loss, "val_loss": problem.val_loss(val_batch)}

    with safe_kernels(problem.model):
        return measured(values)


def _losses(
    problem: BilevelProblem,
    train_batch: Batch,
    val_batch: Batch,
    capture: AbstractContextManager[list[Tensor]] | None = None,
    val_parts: Sequence[Batch] = (),
) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Tensor | None, ...]]]:
    """Return both losses, what `capture` has found in the training loss, and gradients of parts."""
    model = problem.model
    inputs = [*problem.weights(), *problem.hypers()]
    slopes: list[tuple[Tensor | None, ...]] = []
    # The same mode as in the inner steps, whose objective this is; but only those may move
    # BatchNorm's running statistics, or the curvature batches would be counted in.
    statistics = RunningStatistics(model)
    with preserved_buffers(model), capture or nullcontext([]) as outputs, statistics.observed():
        train_loss = whole_loss(problem, "train_loss", train_batch)
    # What λ is judged by is the model as it will be used: no dropout, and running statistics,
    # which go where the weights go.
    with evaluating(model), preserved_buffers(model), statistics.followed():
        val_loss = whole_loss(problem, "val_loss", val_batch)
        if val_parts:
            device = inputs[0].device
            with drawn_again(GlobalState(device), device):
                for part in val_parts:
                    loss = own_loss(problem, "val_loss", part)
                    # Running statistics are on the graph of the training loss, which is kept.
                    found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
                    slopes.append(found)
    return train_loss, val_loss, outputs, slopes


def own_loss(problem: BilevelProblem, method: str, batch: Batch) -> Tensor:
    """Return a loss of a batch: where several processes share it, the part that this one adds.

    Args:
        problem: At its present weights and λ.
        method: ``"train_loss"`` or ``"val_loss"``.
        batch: The whole batch.
    """
    group = active_group()
    if group is None:
        return as_loss(getattr(problem, method)(batch), method)
    share, weight = share_of(problem, batch, group)
    loss = as_loss(getattr(problem, method)(share), method)
    return loss * (weight.to(loss) if isinstance(weight, Tensor) else weight)


def whole_loss(problem: BilevelProblem, method: str, batch: Batch) -> Tensor:
    """Return a loss of a batch, with the derivatives of `own_loss`, which are `summed` later."""
    loss, group = own_loss(problem, method, batch), active_group()
    return loss if group is None else total(loss, group)


def training_gradient(
    problem: BilevelProblem, batch: Batch, weights: Tensors
) -> tuple[Tensor, list[Tensor]]:
    """Return the training loss and its gradient as `linearise_problem` takes them, detached.

    Args:
        problem: At its present weights and λ; the penalty is left out.
        batch: Of the training data.
        weights: Those of its weights that are wanted.
    """
    # Checkpoints run their forward pass again in the backward pass, so that is inside as well.
    with safe_kernels(problem.model), preserved_buffers(problem.model):
        loss = whole_loss(problem, "train_loss", batch)
        found = torch.autograd.grad(loss, list(weights), allow_unused=True)
    return loss.detach(), fill_missing(summed(found, weights), weights)


def aligned_penalty(problem: BilevelProblem) -> Penalty | None:
    """Return the problem's penalty as one over all of its weights."""
    penalty = as_penalty(problem.penalty())
    return None if penalty is None else penalty.aligned(problem.weights())


class Functional:
    """The losses of a problem as functions of explicit weights, for unrolling and for checks.

    Nothing is copied: the weights given stand in for the model's parameters during the call.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = problem
        self._names = list(named(problem.model, "the model"))

    def train_loss(self, weights: Tensors, batch: Batch) -> Tensor:
        """Return the whole training objective, the penalty included, at `weights`."""
        loss = self._call("train_loss", weights, batch)
        penalty = aligned_penalty(self._problem)
        return loss if penalty is None else loss + penalty.value(weights)

    def val_loss(self, weights: Tensors, batch: Batch, train_batch: Batch) -> Tensor:
        """Return the validation loss at `weights`, in evaluation mode.

        Args:
            weights: Stand in for the model's.
            batch: Of the validation data.
            train_batch: What the running statistics of normalisations are computed from, at
                `weights`, if they are computed in training.
        """
        model = self._problem.model
        statistics = RunningStatistics(model)
        if any(m.training and m._buffers for m in model.modules()):
            with preserved_buffers(model), statistics.observed():
                self._call("train_loss", weights, train_batch)
        with evaluating(model), statistics.followed(settled=True):
            return self._call("val_loss", weights, batch)

    def _call(self, method: str, weights: Tensors, batch: Batch) -> Tensor:
        values = {f"model.{n}": w for n, w in zip(self._names, weights, strict=True)}
        # The weights are in place during the call alone: nothing may be run again afterwards.
        with kept_activations():
            loss = functional_call(_Method(self._problem, method), values, (batch,))
        return as_loss(loss, method, graph=False)


class _Method(nn.Module):
    """A problem's loss as a module's forward, the form `functional_call` takes."""

    def __init__(self, problem: BilevelProblem, method: str) -> None:
        super().__init__()
        self.model = problem.model
        self.training = problem.model.training
        self._method = getattr(problem, method)

    def forward(self, batch: Batch) -> Any:
        return self._method(batch)
