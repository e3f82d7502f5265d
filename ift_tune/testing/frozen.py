"""A problem frozen: both losses as fixed functions of w and λ, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import Hypergradient, solve
from ift_tune.implicit.inverse import Inverse
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.unrolled import UnrolledHypergradient, unrolled_hypergradient
from ift_tune.implicit.vectors import Tensors
from ift_tune.problem.batches import Batch, Loader, map_batch, to_device
from ift_tune.problem.losses import Functional, linearise_problem
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.minimise import leaves_of, minimise


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
            self.train_batch = self._first(self.splits.curvature or self.splits.train)
            self.val_batch = self._first(self.splits.val)

    def train_loss(self, batch: Batch) -> Tensor:
        """Return the problem's training loss, with the same random numbers every time."""
        with self._noise.aside():
            return self._problem.train_loss(batch)

    def val_loss(self, batch: Batch) -> Tensor:
        """Return the problem's validation loss likewise."""
        with self._noise.aside():
            return self._problem.val_loss(batch)

    def penalty(self) -> Penalty | None:
        """Return the problem's penalty at the present λ."""
        return self._problem.penalty()

    def train_loss_at(self, weights: Tensors) -> Tensor:
        """Return the whole training objective at `weights`, the penalty included."""
        return self._functional.train_loss(weights, self.train_batch)

    def val_loss_at(self, weights: Tensors) -> Tensor:
        """Return the validation loss at `weights`."""
        return self._functional.val_loss(weights, self.val_batch)

    def present(self) -> list[Tensor]:
        """Return copies of the present weights."""
        return [w.detach().clone() for w in self.weights()]

    @torch.no_grad()
    def move_to(self, weights: Tensors) -> None:
        """Put the weights at given values."""
        for parameter, value in zip(self.weights(), weights, strict=True):
            parameter.copy_(value)

    def minimised(self, start: Tensors) -> tuple[list[Tensor], float]:
        """Return w*(λ) near `start`, and the norm of the gradient there; the weights stay.

        Raises:
            UsageError: If there is no stationary point within reach.
        """
        with safe_kernels(self.model):
            return minimise(self.train_loss_at, start)

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

    def _first(self, loader: Loader) -> Batch:
        batch = to_device(next(iter(loader)), self.device)
        return map_batch(lambda t: t.double() if t.is_floating_point() else t, batch)


def as_double(problem: BilevelProblem) -> BilevelProblem:
    """Return a deep copy of the problem with its modules and tensors in float64."""
    double = copy.deepcopy(problem)
    for name, value in vars(double).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(double, name, value.double())
        elif isinstance(value, nn.Module):
            value.double()
    return double
