"""A problem held still, and its inner problem solved: the ground under finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.curvature import Hessian
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import (
    Hypergradient,
    UnrolledHypergradient,
    solve,
    unrolled_hypergradient,
)
from ift_tune.implicit.inverse import Inverse
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import Tensors, axpy, count, fill_missing, flatten, unflatten
from ift_tune.problem.batches import Batch, Loader, map_batch, to_device
from ift_tune.problem.losses import Functional, aligned_penalty, linearise_problem
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_loss

Loss: TypeAlias = Callable[[list[Tensor]], Tensor]
_STATIONARY = 1e-10  # gradient norm, relative to 1 + |loss|
_BASIN = 1e-6  # gradient norm from which Newton's method is quicker than L-BFGS
_LBFGS_STEPS = 500
_NEWTON_STEPS = 50
_QUICK = 0.1  # of the gradient norm, left by a step: the Hessian before it is good for another
_HALVINGS = 20


class Minimum(NamedTuple):
    """Where the gradient of a loss vanishes.

    Attributes:
        weights: There.
        size: Norm of the gradient there.
        inverse: g → |H|⁺·g, of weights close by; None if none was needed.
    """

    weights: list[Tensor]
    size: float
    inverse: Callable[[Tensor], Tensor] | None


def minimise(
    loss: Loss, start: Tensors, inverse: Callable[[Tensor], Tensor] | None = None
) -> Minimum:
    """Return weights where the gradient of `loss` vanishes.

    L-BFGS finds the basin, Newton's method with backtracking the last digits. Its dense Hessian
    is computed anew only when the one before serves no longer.

    Args:
        loss: Of the weights.
        start: Weights; they stay.
        inverse: Of a loss that differs little, whose minimum is where this starts.

    Raises:
        UsageError: If the gradient does not get small, as for a loss without a minimum.
    """
    weights = leaves_of(start)
    if inverse is None and float(torch.linalg.vector_norm(_gradient(loss, weights)[1])) > _BASIN:
        _lbfgs(loss, weights)
    before = math.inf
    for _ in range(_NEWTON_STEPS):
        value, flat = _gradient(loss, weights)
        size = float(torch.linalg.vector_norm(flat))
        stationary = size <= _STATIONARY * (1.0 + abs(value))
        slow = size > _QUICK * before
        # Where the loss is flat, a small gradient is still far from the minimum: to the last digit.
        if stationary and (inverse is None or slow):
            break
        if renewed := inverse is None or slow:
            inverse = _absolute_inverse(loss, weights)
        before, step = size, inverse(flat)
        following = _backtrack(loss, weights, unflatten(step, weights), value, size)
        if following is not None:
            weights = following
        elif renewed or stationary:
            break
        else:
            inverse = None
    if stationary:
        return Minimum([w.detach() for w in weights], size, inverse)
    raise UsageError(
        f"the training loss has no stationary point that L-BFGS and Newton's method reach "
        f"(gradient norm {size:.1e} over {count(weights)} weights), and the implicit function "
        "theorem needs one: add a weight decay where the loss has no minimum, and check the "
        "problem with smooth operations where it has kinks (ELU for ReLU, average for max pooling)"
    )


def _absolute_inverse(loss: Loss, weights: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return g → |H|⁺·g: saddle points repel, flat directions stay."""
    raw = torch.autograd.grad(loss(weights), weights, create_graph=True, allow_unused=True)
    hessian = Hessian(raw, weights).dense()
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
    # |H|, or a saddle point would attract; and H⁺, for a flat direction (as of logits that all move
    # alike) has no step.
    cutoff = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    basis, scales = vectors[:, values.abs() > cutoff], values[values.abs() > cutoff].abs()
    return lambda gradient: basis @ ((basis.T @ gradient) / scales)


def _backtrack(
    loss: Loss, weights: list[Tensor], step: Tensors, value: float, size: float
) -> list[Tensor] | None:
    """Return the first of w − s, w − s/2, ... with a lower loss or a smaller gradient."""
    for halving in range(_HALVINGS):
        tried = leaves_of(axpy([w.detach() for w in weights], -(0.5**halving), step))
        new_value, gradient = _gradient(loss, tried)
        # At the last digits the loss has stopped to change, and only its gradient still tells.
        if new_value < value or float(torch.linalg.vector_norm(gradient)) < size:
            return tried
    return None


def _lbfgs(loss: Loss, weights: list[Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        weights,
        max_iter=_LBFGS_STEPS,
        history_size=50,
        tolerance_grad=_BASIN,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward(inputs=weights)  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()


def _gradient(loss: Loss, weights: list[Tensor]) -> tuple[float, Tensor]:
    value = loss(weights)
    grads = torch.autograd.grad(value, weights, allow_unused=True)
    return float(value.detach()), flatten(fill_missing(grads, weights))


def leaves_of(weights: Tensors) -> list[Tensor]:
    """Return detached copies that require gradients."""
    return [w.detach().clone().requires_grad_() for w in weights]


class FrozenProblem(BilevelProblem):
    """A copy of a problem in which nothing but w and λ can change.

    In float64 and evaluation mode, with one batch of each kind and the same random numbers in every
    evaluation (for learned dropout and augmentation): so that finite differences mean something,
    and two answers differ by how they were found alone. All that is differentiated is computed and
    differentiated on the kernels of training, so whatever trains can be checked and studied.

    Attributes:
        device: Where it lives.
        train_batch: The first of the curvature loader, or of the training loader without one.
        val_batch: The first of the validation loader.
    """

    def __init__(self, problem: BilevelProblem, *, seed: int = 0) -> None:
        """Copy the problem and take its batches.

        Args:
            problem: Not modified.
            seed: Of whatever the losses draw.

        Raises:
            UsageError: If the problem is incomplete.
        """
        problem.validate()
        self._problem = as_double(problem)
        self.model, self.hyper = self._problem.model.eval(), self._problem.hyper.eval()
        self.splits = self._problem.splits
        self.device = self.weights()[0].device
        self._functional = Functional(self)
        # Each loss begins at the same random state, whatever the other has drawn.
        self._noise = RandomStream(seed, self.device)
        with self._noise.aside():
            self.train_batch = self._first("train", self.splits.curvature or self.splits.train)
            self.val_batch = self._first("val", self.splits.val)

    def train_loss(self, batch: Batch) -> Tensor:
        """Return the problem's training loss, with the same random numbers every time."""
        with self._noise.aside():
            return as_loss(self._problem.train_loss(batch), "train_loss", graph=False)

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the problem's validation loss likewise."""
        with self._noise.aside():
            return as_loss(self._problem.val_loss(batch), "val_loss", graph=False)

    def batch_size(self, batch: Batch) -> float:
        """Return what the problem counts as the examples of a batch."""
        return self._problem.batch_size(batch)

    def penalty(self) -> Penalty | None:
        """Return the problem's penalty at the present λ."""
        return aligned_penalty(self._problem)

    def train_loss_at(self, weights: Tensors) -> Tensor:
        """Return the whole training objective at `weights`, the penalty included."""
        return self._functional.train_loss(weights, self.train_batch)

    def val_loss_at(self, weights: Tensors) -> Tensor:
        """Return the validation loss at `weights`."""
        return self._functional.val_loss(weights, self.val_batch, self.train_batch)

    def present(self) -> list[Tensor]:
        """Return copies of the present weights."""
        return [w.detach().clone() for w in self.weights()]

    @torch.no_grad()
    def move_to(self, weights: Tensors) -> None:
        """Put the weights at given values."""
        for parameter, value in zip(self.weights(), weights, strict=True):
            parameter.copy_(value)

    def minimised(
        self, start: Tensors, inverse: Callable[[Tensor], Tensor] | None = None
    ) -> Minimum:
        """Return w*(λ) near `start`, see `minimise`; the weights stay.

        Raises:
            UsageError: If there is no stationary point within reach.
        """
        with safe_kernels(self.model):
            return minimise(self.train_loss_at, start, inverse)

    def linearise(self, *, gauss_newton: bool = False) -> Linearisation:
        """Return the problem linearised at its present weights; see `linearise_problem`."""
        return linearise_problem(self, self.train_batch, self.val_batch, gauss_newton=gauss_newton)

    def hypergradient(self, inverse: Inverse, *, gauss_newton: bool = False) -> Hypergradient:
        """Return the hypergradient at the present weights."""
        return solve(self.linearise(gauss_newton=gauss_newton), inverse)

    def unrolled(self, steps: int, lr: float) -> UnrolledHypergradient:
        """Return the hypergradient through `steps` steps of gradient descent from the weights."""
        with safe_kernels(self.model):
            return unrolled_hypergradient(
                self.train_loss_at,
                self.val_loss_at,
                leaves_of(self.weights()),
                self.hyper,
                steps=steps,
                lr=lr,
            )

    def _first(self, name: str, loader: Loader) -> Batch:
        batch = next(iter(loader), None)
        if batch is None:
            raise UsageError(f"the {name} loader yields no batch: give it examples")
        return double_batch(to_device(batch, self.device))


def double_batch(batch: Batch) -> Batch:
    """Return the batch with its real numbers in float64; indices and classes stay as they are."""
    return map_batch(lambda t: t.double() if t.is_floating_point() else t, batch)


def as_double(problem: BilevelProblem, *, same_splits: bool = False) -> BilevelProblem:
    """Return a deep copy of the problem with its modules and tensors in float64.

    Args:
        problem: Not modified.
        same_splits: Whether the copy has the same loaders and not copies: of all the data.
    """
    known = {id(problem.splits): problem.splits} if same_splits else {}
    double = copy.deepcopy(problem, known)
    for name, value in vars(double).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(double, name, value.double())
        elif isinstance(value, nn.Module):
            value.double()
    return double
