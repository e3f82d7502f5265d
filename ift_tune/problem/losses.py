"""The losses of a problem as mathematics takes them: linearised, or functions of the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.linearisation import Linearisation, linearise
from ift_tune.implicit.vectors import Tensors, named
from ift_tune.problem.batches import Batch
from ift_tune.problem.modes import captured_outputs, evaluating, preserved_buffers
from ift_tune.problem.problem import BilevelProblem


def linearise_problem(
    problem: BilevelProblem, train_batch: Batch, val_batch: Batch, *, gauss_newton: bool = False
) -> Linearisation:
    """Return a problem linearised at its present weights and λ.

    What trains, what checks and what studies all come by here, so that a problem is treated alike.
    The products are taken with the kernels of this call (see `Kernels`), whoever takes them.

    Args:
        problem: Its model is as before afterwards, its modes and buffers too.
        train_batch: Of the curvature loader, or of the training loader without one.
        val_batch: Of the validation loader.
        gauss_newton: Whether the Gauss-Newton matrix takes the Hessian's place.

    Raises:
        UsageError: If a loss has no graph, or the Gauss-Newton matrix is asked for and the training
            loss does not call the model once for one tensor.
        DoubleBackwardError: If an operation hides its curvature from autograd; it is named.
    """
    model = problem.model
    capture: AbstractContextManager[list[Tensor]] = (
        captured_outputs(model) if gauss_newton else nullcontext([])
    )
    with safe_kernels(model):
        # The same mode as in the inner steps, whose objective this is; but only those may move
        # BatchNorm's running statistics, or the curvature batches would be counted in.
        with preserved_buffers(model), capture as outputs:
            train_loss = problem.train_loss(train_batch)
        # What λ is judged by is the model as it will be used: no dropout, running statistics.
        with evaluating(model):
            val_loss = problem.val_loss(val_batch)
        return linearise(
            train_loss,
            val_loss,
            model,
            problem.hyper,
            penalty=problem.penalty(),
            outputs=outputs[0] if gauss_newton else None,
        )


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
        penalty = self._problem.penalty()
        return loss if penalty is None else loss + penalty.value(weights)

    def val_loss(self, weights: Tensors, batch: Batch) -> Tensor:
        """Return the validation loss at `weights`."""
        return self._call("val_loss", weights, batch)

    def _call(self, method: str, weights: Tensors, batch: Batch) -> Tensor:
        values = {f"model.{n}": w for n, w in zip(self._names, weights, strict=True)}
        loss: Tensor = functional_call(_Method(self._problem, method), values, (batch,))
        return loss


class _Method(nn.Module):
    """A problem's loss as a module's forward, the form `functional_call` takes."""

    def __init__(self, problem: BilevelProblem, method: str) -> None:
        super().__init__()
        self.model = problem.model
        self.training = problem.model.training
        self._method = getattr(problem, method)

    def forward(self, batch: Batch) -> Any:
        return self._method(batch)
