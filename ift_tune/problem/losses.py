"""Both losses of an outer step, in the modes that they need, and as functions of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ift_tune.base.errors import UsageError
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.linearisation import Linearisation, linearise
from ift_tune.implicit.vectors import Tensors, named
from ift_tune.problem.batches import Batch
from ift_tune.problem.problem import BilevelProblem


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards every submodule has the mode it had."""
    # One by one: a user may keep some submodules, such as frozen BatchNorm, in evaluation mode.
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextlib.contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Let copies stand in for the buffers: an outer step must not move BatchNorm's statistics.

    Copies, not a restoration afterwards: graphs built before, inside and after stay valid.
    """
    saved = [
        (m, name, buffer)
        for m in module.modules()
        for name, buffer in m.named_buffers(recurse=False, remove_duplicate=False)
    ]
    # By identity: a buffer that two modules share must stay shared.
    copies = {id(buffer): buffer.clone() for _, _, buffer in saved}
    for submodule, name, buffer in saved:
        setattr(submodule, name, copies[id(buffer)])
    try:
        yield
    finally:
        for submodule, name, buffer in saved:
            setattr(submodule, name, buffer)


@contextlib.contextmanager
def without_gradients(tensors: Tensors) -> Iterator[None]:
    """Make leaf tensors constants: inside, no graph to them is built."""
    for tensor in tensors:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)


@contextlib.contextmanager
def captured_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the model returns, for the Gauss-Newton matrix.

    Raises:
        UsageError: If the model is not called exactly once, or returns more than one tensor.
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        found = ", ".join(type(output).__name__ for output in outputs) or "no call"
        raise UsageError(
            "curvature='gauss_newton' needs a training loss that calls the model once and a model "
            f"that returns one tensor, got {found}; use curvature='hessian'"
        )


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
