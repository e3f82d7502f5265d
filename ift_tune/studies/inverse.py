"""The inverse-Hessian study: how near each approximation comes to the exact answer, at what cost.

Lorraine, Vicol, Duvenaud 2020 compare Neumann and conjugate gradient at 0 to 50 steps with the
exact inverse on a small regression; here on any problem, with the cost and with further methods.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from ift_tune.base.errors import UsageError, require_number
from ift_tune.implicit.curvature import largest_eigenvalue
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.inverse import Neumann
from ift_tune.implicit.vectors import Tensors, count, dot, norm, relative_error
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.cost import GRADIENT, HVP, training_passes
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.problem import BilevelProblem
from ift_tune.studies.inverse_findings import INITIAL, TRAINED, judge_inverses
from ift_tune.studies.methods import (
    DENSE_WEIGHTS,
    METHODS,
    STEPS,
    UNROLLED,
    Exact,
    Method,
    solve_exactly,
)
from ift_tune.studies.writing import Study
from ift_tune.testing.frozen import FrozenProblem
from ift_tune.testing.price import timed

_log = logging.getLogger(__name__)

POWER_STEPS = Neumann(terms=0).max_hvps(1, previous=False)  # unrolling is charged the same


@dataclass(frozen=True)
class Row:
    """One approximation at one state of the weights.

    Attributes:
        state: ``"initial"`` or ``"trained"``.
        method: See `METHODS`.
        steps: Passes, iterations, columns or unrolled steps.
        products: Hessian-vector products, those for the step size among them.
        gradient_equivalents: The whole hypergradient: both first derivatives, the solve's products,
            the mixed product; see `joint.cost.Cost`.
        seconds: Its wall time, median over the repeats.
        solve_status: What the solve said of itself.
        cosine: Of the hypergradient with the exact one.
        relative_l2: ‖g − g*‖/‖g*‖ of the hypergradient.
        cosine_q: Of q = H⁻¹v; not known of unrolling.
        relative_l2_q: ‖q − q*‖/‖q*‖.
    """

    state: str
    method: str
    steps: int
    products: int
    gradient_equivalents: float
    seconds: float
    solve_status: str
    cosine: float
    relative_l2: float
    cosine_q: float
    relative_l2_q: float


@dataclass(frozen=True)
class Training:
    """How the weights of the trained state are found.

    Attributes:
        config: Its inner optimiser, where plain training is used.
        inner_steps: Length of that.
        solved_weights: Up to so many weights the inner problem is solved to stationarity instead.
    """

    config: MetaConfig
    inner_steps: int = 1000
    solved_weights: int = DENSE_WEIGHTS


def study_inverses(
    problem: BilevelProblem,
    training: Training,
    *,
    task: str = "",
    steps: Sequence[int] = STEPS,
    methods: Sequence[Method] = METHODS,
    cosine: float = 0.9,
    damping: float = 0.0,
    dense_weights: int = DENSE_WEIGHTS,
    repeats: int = 3,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Measure every method at the problem's initial and at its trained weights.

    In float64, in evaluation mode, with one training and one validation batch throughout.

    Args:
        problem: Not modified.
        training: How the trained weights are found.
        task: Its name, for the title.
        steps: Numbers of steps to try.
        methods: What to compare.
        cosine: The quality asked of the cheapest method.
        damping: Added to the reference's diagonal; see `solve_exactly`.
        dense_weights: Likewise.
        repeats: Timings of each, at least 1.
        seed: Of what the losses draw.
        on_progress: Called with a line as the study goes on.

    Returns:
        Tables ``inverse`` (a row a method and number of steps), ``states`` (the reference and what
        it rests on) and ``relation`` (unrolling against Neumann), with findings.

    Raises:
        UsageError: If an argument is out of range or the problem is incomplete.

    Example:
        >>> from ift_tune import MetaConfig, testing
        >>> from ift_tune.studies.inverse import Training, study_inverses
        >>> problem = testing.Quadratic(seed=0)
        >>> study = study_inverses(problem, Training(MetaConfig()), steps=[1, 20], repeats=1)
        >>> table = study.tables["inverse"].set_index(["state", "method", "steps"])["cosine"]
        >>> bool(table["trained", "conjugate_gradient", 20] > 0.999)
        True
    """
    chosen = sorted(set(steps))
    if not chosen or chosen[0] < 0:
        raise UsageError(f"steps must be numbers of at least 0, got {list(steps)}")
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    if not 0.0 < cosine < 1.0:
        raise UsageError(f"cosine must be between 0 and 1, got {cosine}")
    require_number("damping", damping, least=0.0)
    frozen = FrozenProblem(problem, seed=seed)
    rows: list[Row] = []
    states: list[dict[str, Any]] = []
    relation: list[dict[str, Any]] = []
    for state in (INITIAL, TRAINED):
        on_progress(f"{state} weights")
        how = (
            "as the task makes them"
            if state == INITIAL
            else _train(frozen, problem, training, seed)
        )
        linearisation = frozen.linearise()
        exact = solve_exactly(linearisation, damping=damping, dense_weights=dense_weights)
        on_progress(f"  reference: {exact.how}, residual {exact.residual:.1e}")
        states.append(
            {
                "state": state,
                "weights_found_by": how,
                "weights": count(linearisation.vector),
                "hypers": count(frozen.hypers()),
                "gradient_norm": linearisation.gradient_norm(),
                "reference": exact.how,
                "reference_damping": damping,
                "reference_residual": exact.residual,
                "reference_products": exact.products,
                "smallest_eigenvalue": exact.smallest_eigenvalue,
                "largest_eigenvalue": exact.largest_eigenvalue,
                "indefinite": exact.indefinite,
            }
        )
        measure = _Measure(frozen, state, exact, repeats)
        for method in methods:
            rows += measure.method(method, chosen)
        top = largest_eigenvalue(linearisation.operator, steps=POWER_STEPS)
        alpha = 1.0 / abs(top.value)
        unrolled, related = measure.unrolled([k for k in chosen if k > 0], alpha)
        rows += unrolled
        relation += related
    tables = {
        "inverse": pd.DataFrame([asdict(row) for row in rows]),
        "states": pd.DataFrame(states),
        "relation": pd.DataFrame(relation),
    }
    findings = judge_inverses(tables["inverse"], tables["states"], tables["relation"], cosine)
    return Study(f"{task or 'problem'}: inverse-Hessian approximations", _ABOUT, tables, findings)


class _Measure:
    """Measures approximations at one state of the weights."""

    def __init__(self, frozen: FrozenProblem, state: str, exact: Exact, repeats: int) -> None:
        self.frozen, self.state, self.exact, self.repeats = frozen, state, exact, repeats
        self.val_share = frozen.batch_size(frozen.val_batch) / frozen.batch_size(frozen.train_batch)

    def method(self, method: Method, steps: Sequence[int]) -> list[Row]:
        """Return a row for each number of steps; none where the method cannot be had."""
        rows = []
        for k in method.among(steps):
            inverse = method.make(k)
            try:
                result, seconds = self._timed(
                    lambda inverse=inverse: self.frozen.hypergradient(  # type: ignore[misc]
                        inverse, gauss_newton=method.gauss_newton
                    )
                )
            except UsageError:
                if not method.gauss_newton:
                    raise
                return []  # a model without one tensor of outputs has no Gauss-Newton matrix
            cost = self._cost(result.stats.hvps)
            rows.append(self._row(method.name, k, result.stats.hvps, cost, seconds, result))
        return rows

    def unrolled(
        self, steps: Sequence[int], alpha: float
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Return rows of unrolling, and how far k steps are from Neumann with K = k − 1."""
        rows, relation = [], []
        for k in steps:
            result, seconds = self._timed(lambda k=k: self.frozen.unrolled(k, alpha))  # type: ignore[misc]
            series = self.frozen.hypergradient(Neumann(terms=k - 1, alpha=alpha))
            # A gradient and, on the way back, a product a step; and what finding α takes.
            cost = (GRADIENT + HVP) * k + GRADIENT * self.val_share + HVP * POWER_STEPS
            rows.append(self._row(UNROLLED, k, k + POWER_STEPS, cost, seconds, result))
            relation.append(
                {
                    "state": self.state,
                    "unrolled_steps": k,
                    "neumann_terms": k - 1,
                    "alpha": alpha,
                    "relative_difference": relative_error(series.grads, result.grads),
                }
            )
        return rows, relation

    def _timed(self, action: Callable[[], Hypergradient]) -> tuple[Hypergradient, float]:
        results = [timed(action, self.frozen.device) for _ in range(self.repeats)]
        return results[-1][0], statistics.median(seconds for _, seconds in results)

    def _cost(self, products: int) -> float:
        """Return the cost of a hypergradient in gradient-equivalents of the training batch."""
        return training_passes(products) + GRADIENT * self.val_share

    def _row(
        self,
        method: str,
        steps: int,
        products: int,
        cost: float,
        seconds: float,
        result: Hypergradient,
    ) -> Row:
        truth = self.exact.grads
        q = result.warm.solution
        return Row(
            state=self.state,
            method=method,
            steps=steps,
            products=products,
            gradient_equivalents=cost,
            seconds=seconds,
            solve_status=result.status.value,
            cosine=cosine_of(result.grads, truth),
            relative_l2=relative_error(result.grads, truth),
            cosine_q=math.nan if q is None else cosine_of(q, self.exact.solution),
            relative_l2_q=math.nan if q is None else relative_error(q, self.exact.solution),
        )


def cosine_of(a: Tensors, b: Tensors) -> float:
    """Return the cosine of the angle between two vectors; NaN if one is 0."""
    lengths = float(norm(a)) * float(norm(b))
    return float(dot(a, b)) / lengths if lengths > 0.0 else math.nan


def _train(frozen: FrozenProblem, problem: BilevelProblem, training: Training, seed: int) -> str:
    """Move the weights to w*(λ), or as near as plain training comes; say how."""
    weights = frozen.present()
    if count(weights) <= training.solved_weights:
        try:
            solved = frozen.minimised(weights).weights
        except UsageError as error:
            # No stationary point within reach: the gradient norm in the table tells how far.
            _log.info("plain training in place of solving the inner problem: %s", error)
        else:
            frozen.move_to(solved)
            return "solved to stationarity"
    trained = copy.deepcopy(problem)  # in its own precision, as its loaders are
    JointOptimizer(trained, training.config, seed=seed).train_weights(training.inner_steps)
    frozen.model.load_state_dict(trained.model.state_dict())  # BatchNorm's statistics too
    return f"{training.inner_steps} steps of {training.config.inner_optimizer}"


_ABOUT = """\
How near each approximation of H⁻¹v comes to the exact answer, for q = H⁻¹v and for the
hypergradient, at the task's initial weights and at trained ones: float64, evaluation mode, one
training and one validation batch, the same λ throughout (as the task initialises it).

Cost: forward and backward over the training batch is 1 gradient-equivalent, a Hessian-vector
product 2; both first derivatives, the mixed product and the products that Neumann spends on its
step size are counted. `states.csv` says what the reference is; at the initial weights the implicit
function theorem does not hold, and the reference is the same formula with the exact inverse."""
