"""Is my problem's hypergradient right: three independent answers compared."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.double_backward import vjp
from ift_tune.implicit.hypergradient import Hypergradient, hypergradient
from ift_tune.implicit.inverse import Dense, Neumann
from ift_tune.implicit.unrolled import unrolled_hypergradient
from ift_tune.implicit.vectors import (
    Tensors,
    count,
    fill_missing,
    flatten,
    randn_like,
    sub,
    zeros_like,
)
from ift_tune.problem.batches import Batch, map_batch, to_device
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem, Functional
from ift_tune.testing.minimise import leaves_of, minimise
from ift_tune.testing.report import CheckReport, Comparison

MAX_WEIGHTS = 3000


def check_hypergradient(
    problem: BilevelProblem,
    *,
    directions: int = 3,
    unrolled_steps: int = 10,
    epsilon: float = 1e-4,
    tolerance: float = 1e-4,
    max_weights: int = MAX_WEIGHTS,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> CheckReport:
    """Compare a problem's hypergradient with three independent answers, in float64.

    On a copy of the problem, in evaluation mode, with the first batch of the curvature (or train)
    and val loaders and the same random numbers in every loss (for learned dropout and
    augmentation), the inner problem is solved to stationarity. There the implicit hypergradient
    with the dense inverse must agree with

    1. central finite differences of L_V(w*(λ), λ) along random directions, with the inner problem
       *re-solved* at every displaced λ;
    2. differentiation through `unrolled_steps` steps of gradient descent, which must equal the
       Neumann series of one term less;
    3. a penalty in closed form must agree with autograd through its `value`.

    Nothing is made smaller without being said: a problem that is too large is refused.

    Args:
        problem: Not modified.
        directions: Random directions for the finite differences, at least 1.
        unrolled_steps: k, at least 1.
        epsilon: Size of the displacement of λ along a unit direction.
        tolerance: Largest relative error of the finite differences.
        max_weights: Refuse more weights than this: the dense inverse is O(P³).
        seed: Of the directions.
        raise_on_failure: Whether a failed comparison raises; else look at ``report.passed``.

    Returns:
        The report; printing it shows a line for each comparison.

    Raises:
        CheckFailedError: If a comparison fails, with the report as its text.
        UsageError: If the problem is incomplete, too large, random, or has no stationary point.
        DoubleBackwardError: If an operation has no second derivative; it is named.
        UnreachableHyperparameterError: If a hyperparameter does not reach the training loss.
    """
    problem.validate()
    size = count(problem.weights())
    if size > max_weights:
        raise UsageError(
            f"the check needs the dense inverse of a {size:,} × {size:,} Hessian: build the same "
            f"problem with a smaller model (at most {max_weights:,} weights), or raise max_weights"
        )
    if directions < 1 or unrolled_steps < 1:
        raise UsageError("directions and unrolled_steps must be at least 1")
    with evaluating(problem.model):
        report = _Check(problem, seed).run(directions, unrolled_steps, epsilon, tolerance)
    if raise_on_failure and not report.passed:
        raise CheckFailedError(f"the hypergradient is not the true one\n{report}")
    return report


class _Check:
    """One check: the problem in float64 with a fixed batch of each kind."""

    def __init__(self, problem: BilevelProblem, seed: int) -> None:
        self.problem = as_double(problem)
        splits = self.problem.splits
        self.train_batch = self._batch(splits.curvature or splits.train)
        self.val_batch = self._batch(splits.val)
        self._functional = Functional(self.problem)
        self.hypers = self.problem.hypers()
        self.seed = seed
        self._noise = RandomStream(seed, self.hypers[0].device)
        self._refuse_randomness()

    def run(
        self, directions: int, unrolled_steps: int, epsilon: float, tolerance: float
    ) -> CheckReport:
        """Solve the inner problem and make all comparisons."""
        weights, stationarity = self.solve([w.detach() for w in self.problem.weights()])
        exact = self.implicit(weights, Dense(max_weights=count(weights)))
        comparisons = [
            self.finite_difference(i, weights, exact.grads, epsilon, tolerance)
            for i in range(directions)
        ]
        comparisons.append(self.unrolling(weights, unrolled_steps, exact))
        comparisons += self.penalty(weights)
        return CheckReport(
            comparisons, count(weights), count(self.hypers), stationarity, exact.status
        )

    def solve(self, start: Tensors) -> tuple[list[Tensor], float]:
        """Return w*(λ) for the present λ, near `start`, and the norm of the gradient there."""
        return minimise(self.train_loss, start)

    def train_loss(self, weights: Tensors) -> Tensor:
        """Return the training objective at `weights`, with the same noise every time."""
        with self._noise.aside():
            return self._functional.train_loss(weights, self.train_batch)

    def val_loss(self, weights: Tensors) -> Tensor:
        """Return the validation loss likewise."""
        with self._noise.aside():
            return self._functional.val_loss(weights, self.val_batch)

    def implicit(self, weights: Tensors, inverse: Dense | Neumann) -> Hypergradient:
        """Return the hypergradient of the library, through the problem's own losses."""
        with torch.no_grad():
            for parameter, value in zip(self.problem.weights(), weights, strict=True):
                parameter.copy_(value)
        with self._noise.aside():
            train_loss = self.problem.train_loss(self.train_batch)
        with self._noise.aside():
            val_loss = self.problem.val_loss(self.val_batch)
        return hypergradient(
            train_loss,
            val_loss,
            self.problem.model,
            self.problem.hyper,
            inverse=inverse,
            penalty=self.problem.penalty(),
        )

    def finite_difference(
        self, index: int, weights: Tensors, grads: Tensors, epsilon: float, tolerance: float
    ) -> Comparison:
        """Compare the slope along a random direction with that of the re-solved problem."""
        direction = flatten(randn_like(self.hypers, self.seed + index))
        direction = direction / torch.linalg.vector_norm(direction)
        slope = (
            self._displaced(weights, direction, epsilon)
            - self._displaced(weights, direction, -epsilon)
        ) / (2.0 * epsilon)
        # Relative to the whole gradient's typical slope: a direction may happen to be flat.
        claimed = float(flatten(grads) @ direction)
        typical = float(torch.linalg.vector_norm(flatten(grads))) / count(grads) ** 0.5
        scale = max(abs(slope), typical, 1e-12)
        return Comparison(
            f"finite differences, direction {index + 1}",
            abs(claimed - slope) / scale,
            tolerance,
            f"slope {slope:.3e}",
        )

    def _displaced(self, weights: Tensors, direction: Tensor, epsilon: float) -> float:
        """Return L_V(w*(λ + ε·d), λ + ε·d), and put λ back."""
        saved = [h.detach().clone() for h in self.hypers]
        try:
            with torch.no_grad():
                pieces = torch.split(direction, [h.numel() for h in self.hypers])
                for hyper, piece in zip(self.hypers, pieces, strict=True):
                    hyper.add_(piece.view_as(hyper), alpha=epsilon)
            solved, _ = self.solve(weights)
            with torch.no_grad():
                return float(self.val_loss(solved))
        finally:
            with torch.no_grad():
                for hyper, value in zip(self.hypers, saved, strict=True):
                    hyper.copy_(value)

    def unrolling(self, weights: Tensors, steps: int, exact: Hypergradient) -> Comparison:
        """Compare k unrolled steps from w* with Neumann's K = k − 1."""
        largest = exact.stats.largest_eigenvalue or 1.0
        alpha = 1.0 / max(abs(largest), 1e-12)
        unrolled = unrolled_hypergradient(
            self.train_loss,
            self.val_loss,
            leaves_of(weights),
            self.problem.hyper,
            steps=steps,
            lr=alpha,
        )
        series = self.implicit(weights, Neumann(terms=steps - 1, alpha=alpha))
        return Comparison(
            f"{steps} unrolled steps against Neumann with K = {steps - 1}",
            relative_error(series.grads, unrolled.grads),
            1e-6,
            "from the stationary point",
        )

    def penalty(self, weights: Tensors) -> list[Comparison]:
        """Compare a closed-form penalty with autograd through its value."""
        penalty = self.problem.penalty()
        if penalty is None:
            return []
        leaves = leaves_of(weights)
        vector = randn_like(leaves, self.seed)
        inputs = [*leaves, *penalty.hypers]
        raw = torch.autograd.grad(
            penalty.value(leaves), leaves, create_graph=True, allow_unused=True
        )
        curved = [(g, v) for g, v in zip(raw, vector, strict=True) if g is not None]
        truth = vjp([g for g, _ in curved], inputs, [v for _, v in curved])
        closed = zeros_like(leaves)
        penalty.add_gradient_(closed, leaves)
        n = len(leaves)
        pairs = {
            "gradient": (closed, fill_missing(raw, leaves)),
            "Hessian product": (penalty.hvp(leaves, vector), truth[:n]),
            "mixed product": (penalty.mixed(leaves, vector), truth[n:]),
        }
        return [
            Comparison(f"closed-form penalty, {name}", relative_error(mine, theirs), 1e-9)
            for name, (mine, theirs) in pairs.items()
        ]

    def _batch(self, loader: object) -> Batch:
        batch = next(iter(loader))  # type: ignore[call-overload]
        batch = to_device(batch, self.problem.weights()[0].device)
        return map_batch(lambda t: t.double() if t.is_floating_point() else t, batch)

    def _refuse_randomness(self) -> None:
        weights = self.problem.weights()
        losses: dict[str, Callable[[Tensors], Tensor]] = {
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
        }
        for name, loss in losses.items():
            with torch.no_grad():
                first, second = float(loss(weights)), float(loss(weights))
            if first != second:
                raise UsageError(
                    f"{name} gives {first} and then {second} on the same batch and weights: draw "
                    "its random numbers from the global generators, which the check holds still"
                )


def relative_error(found: Tensors, truth: Tensors) -> float:
    """Return ‖found − truth‖/‖truth‖; the absolute error where the truth is 0."""
    difference = float(torch.linalg.vector_norm(flatten(sub(found, truth)).detach()))
    size = float(torch.linalg.vector_norm(flatten(truth).detach()))
    return difference / size if size > 0.0 else difference


def as_double(problem: BilevelProblem) -> BilevelProblem:
    """Return a deep copy of the problem with its modules and tensors in float64."""
    double = copy.deepcopy(problem)
    for name, value in vars(double).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(double, name, value.double())
        elif isinstance(value, nn.Module):
            value.double()
    return double
