"""A problem held still: one batch of each kind, evaluation mode, float64, the same noise always."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ift_tune.cost import GRADIENT, HVP
from ift_tune.curvature import Hessian
from ift_tune.double_backward import safe_kernels
from ift_tune.hypergradient import Hypergradient, hypergradient
from ift_tune.inverse import Inverse
from ift_tune.modes import captured_outputs
from ift_tune.problem import BilevelProblem, Functional, batch_size, map_batch, to_device
from ift_tune.randomness import RandomStream
from ift_tune.testing.check import as_double
from ift_tune.testing.minimise import leaves_of
from ift_tune.types import Batch, Tensors
from ift_tune.unrolled import unrolled_hypergradient
from ift_tune.vectors import fill_missing, flatten


class StillProblem:
    """Both losses as fixed functions of the weights, so that only the inverse differs.

    A copy of the problem in float64; the original is not touched. The training batch is the first
    of the curvature loader (of the training loader without one).

    Attributes:
        problem: The copy.
        functional: Its losses at explicit weights.
    """

    def __init__(self, problem: BilevelProblem, *, seed: int = 0) -> None:
        """Copy the problem and take its batches.

        Args:
            problem: Not modified.
            seed: Of whatever the losses draw, the same in each evaluation.
        """
        problem.validate()
        self.problem = as_double(problem)
        self.problem.model.eval()
        self.problem.hyper.eval()
        self.functional = Functional(self.problem)
        self.device = self.problem.weights()[0].device
        self._noise = RandomStream(seed, self.device)
        with self._noise.aside():
            splits = self.problem.splits
            self._train_batch = self._first(splits.curvature or splits.train)
            self._val_batch = self._first(splits.val)
        self.val_share = batch_size(self._val_batch) / batch_size(self._train_batch)

    def weights(self) -> list[Tensor]:
        """Return copies of the present weights."""
        return [w.detach().clone() for w in self.problem.weights()]

    @torch.no_grad()
    def move_to(self, weights: Tensors) -> None:
        """Put the weights at given values."""
        for parameter, value in zip(self.problem.weights(), weights, strict=True):
            parameter.copy_(value)

    def train_loss_at(self, weights: Tensors) -> Tensor:
        """Return the whole training objective, the penalty included."""
        with self._noise.aside():
            return self.functional.train_loss(weights, self._train_batch)

    def val_loss_at(self, weights: Tensors) -> Tensor:
        """Return the validation loss."""
        with self._noise.aside():
            return self.functional.val_loss(weights, self._val_batch)

    def hypergradient(self, inverse: Inverse, *, gauss_newton: bool = False) -> Hypergradient:
        """Return the hypergradient at the present weights.

        Raises:
            UsageError: If the Gauss-Newton matrix is asked for and the model's outputs are not one
                tensor.
        """
        problem = self.problem
        capture: AbstractContextManager[list[Tensor]] = (
            captured_outputs(problem.model) if gauss_newton else nullcontext([])
        )
        with safe_kernels(problem.model):
            with capture as outputs, self._noise.aside():
                train_loss = problem.train_loss(self._train_batch)
            with self._noise.aside():
                val_loss = problem.val_loss(self._val_batch)
            return hypergradient(
                train_loss,
                val_loss,
                problem.model,
                problem.hyper,
                inverse=inverse,
                penalty=problem.penalty(),
                outputs=outputs[0] if gauss_newton else None,
            )

    def unrolled(self, steps: int, lr: float) -> Hypergradient:
        """Return the hypergradient through `steps` steps of gradient descent from the weights."""
        with safe_kernels(self.problem.model):
            return unrolled_hypergradient(
                self.train_loss_at,
                self.val_loss_at,
                leaves_of(self.problem.weights()),
                self.problem.hyper,
                steps=steps,
                lr=lr,
            )

    def system(self) -> LinearSystem:
        """Return the linear system H·q = v of the hypergradient at the present weights."""
        weights, penalty = self.problem.weights(), self.problem.penalty()
        with safe_kernels(self.problem.model), self._noise.aside():
            loss = self.problem.train_loss(self._train_batch)
        by_train = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        with safe_kernels(self.problem.model), self._noise.aside():
            val_loss = self.problem.val_loss(self._val_batch)
        by_val = torch.autograd.grad(val_loss, weights, allow_unused=True)
        # The rows of `hypergradient`: weights that the training loss does not see have none.
        seen = [i for i, g in enumerate(by_train) if g is not None or penalty is not None]
        rows = [weights[i] for i in seen]
        gradient = [by_train[i] for i in seen]
        slope = fill_missing(tuple(gradient), rows)
        slope = [g.detach().clone() for g in slope]
        if penalty is not None:
            penalty.add_gradient_(slope, rows)
        return LinearSystem(
            Hessian(gradient, rows, penalty),
            fill_missing(tuple(by_val[i] for i in seen), rows),
            float(torch.linalg.vector_norm(flatten(slope))),
        )

    def cost(self, products: int) -> float:
        """Return the cost of a hypergradient in gradient-equivalents of the training batch.

        Both first derivatives, the solve's products and the mixed product; see `cost.Cost`.
        """
        return GRADIENT * (1.0 + self.val_share) + HVP * (products + 1)

    def unrolled_cost(self, steps: int) -> float:
        """Return the same for unrolling: a gradient and, on the way back, a product a step."""
        return (GRADIENT + HVP) * steps + GRADIENT * self.val_share

    def _first(self, loader: object) -> Batch:
        batch = to_device(next(iter(loader)), self.device)  # type: ignore[call-overload]
        return map_batch(lambda t: t.double() if t.is_floating_point() else t, batch)


class LinearSystem:
    """H·q = v at some weights.

    Attributes:
        operator: H.
        vector: v, the gradient of the validation loss.
        gradient_norm: ‖∂L_T/∂w‖ there: 0 where the implicit function theorem holds.
    """

    def __init__(self, operator: Hessian, vector: list[Tensor], gradient_norm: float) -> None:
        self.operator, self.vector, self.gradient_norm = operator, vector, gradient_norm
