"""A problem held still, and the exact answer that approximations are measured against."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.randomness import RandomStream
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Hessian, Operator, damped, largest_eigenvalue
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import Hypergradient, hypergradient
from ift_tune.implicit.inverse import Dense, Inverse, InverseResult, State
from ift_tune.implicit.unrolled import unrolled_hypergradient
from ift_tune.implicit.vectors import Tensors, count, fill_missing, flatten, norm, sub, unflatten
from ift_tune.joint.cost import GRADIENT, HVP
from ift_tune.problem.batches import Batch, batch_size, map_batch, to_device
from ift_tune.problem.modes import captured_outputs
from ift_tune.problem.problem import BilevelProblem, Functional
from ift_tune.testing.check import as_double
from ift_tune.testing.minimise import leaves_of


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


DENSE_WEIGHTS = 3000


_TOLERANCE = 1e-10


_EIGENVALUE_STEPS = 60


@dataclass(frozen=True)
class Known(Inverse[State]):
    """An "approximation" whose answer is given: it lets a q found elsewhere become a hypergradient.

    Attributes:
        answer: q.
    """

    name: ClassVar[str] = "known"
    refines: ClassVar[bool] = False

    answer: Tensors = field(default=())

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return 0."""
        return 0

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        return State(operator)

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        return InverseResult(list(self.answer), SolveStatus.CONVERGED)


@dataclass(frozen=True)
class Exact:
    """The reference.

    Attributes:
        how: ``"dense"``, or ``"minres"`` where P is too large for a matrix.
        solution: q = (H + damping·I)⁻¹v.
        hypergradient: What it gives.
        residual: ‖v − (H + damping·I)q‖/‖v‖, computed with a product of its own.
        smallest_eigenvalue: Of H: exact if dense, else an upper bound by power iteration.
        largest_eigenvalue: Exact if dense, else a lower bound.
        products: What it took.
    """

    how: str
    solution: list[Tensor]
    hypergradient: Hypergradient
    residual: float
    smallest_eigenvalue: float
    largest_eigenvalue: float
    products: int

    @property
    def indefinite(self) -> bool:
        """Whether H has a negative eigenvalue, beyond rounding."""
        return self.smallest_eigenvalue < -1e-10 * abs(self.largest_eigenvalue)


def solve_exactly(
    still: StillProblem,
    system: LinearSystem,
    *,
    damping: float = 0.0,
    dense_weights: int = DENSE_WEIGHTS,
    most_steps: int = 2000,
) -> Exact:
    """Return the reference at the problem's present weights.

    Args:
        still: The problem.
        system: Its linear system there.
        damping: Added to the diagonal of H in the reference alone.
        dense_weights: Above so many weights, MINRES (Paige and Saunders 1975) in place of the
            dense matrix: unlike conjugate gradient it solves indefinite systems too.
        most_steps: Of MINRES.
    """
    operator = damped(system.operator, damping)
    if count(system.vector) <= dense_weights:
        how = "dense"
        state = Dense(max_weights=dense_weights).init(operator)
        solution = Dense(max_weights=dense_weights).solve(state, system.vector).value
        values: Any = getattr(state, "values", None)
        values = torch.full((1,), torch.nan) if values is None else values - damping
        smallest, largest = float(values[0]), float(values[-1])
    else:
        how = "minres"
        solution = _minres(operator, system.vector, most_steps)
        smallest, largest = _extremes(system.operator)
    products = system.operator.products
    remainder = sub(system.vector, operator.matvec(solution))
    return Exact(
        how,
        solution,
        still.hypergradient(Known(tuple(solution))),
        float(norm(remainder)) / max(float(norm(system.vector)), 1e-300),
        smallest,
        largest,
        products,
    )


def _minres(operator: Operator, vector: Tensors, most_steps: int) -> list[Tensor]:
    from scipy.sparse.linalg import LinearOperator, minres

    like = list(vector)
    flat = flatten(like)

    def product(x: np.ndarray[Any, Any]) -> Any:
        given = torch.from_numpy(np.array(x).reshape(-1)).to(flat)
        return flatten(operator.matvec(unflatten(given, like))).cpu().numpy()

    matrix = LinearOperator((flat.numel(), flat.numel()), matvec=product, dtype=np.float64)
    found, _ = minres(matrix, flat.cpu().numpy(), rtol=_TOLERANCE, maxiter=most_steps)
    return unflatten(torch.from_numpy(found).to(flat), like)


def _extremes(operator: Operator) -> tuple[float, float]:
    """Return an upper bound of the smallest eigenvalue and a lower bound of the largest."""
    first = largest_eigenvalue(operator, steps=_EIGENVALUE_STEPS).value
    # H − first·I has its eigenvalue of largest magnitude at the other end of the spectrum.
    other = largest_eigenvalue(damped(operator, -first), steps=_EIGENVALUE_STEPS).value + first
    return min(first, other), max(first, other)
