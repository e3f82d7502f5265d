"""An inverse-Hessian approximation: `init(operator)`, then `solve(state, vector)`."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

from torch import Tensor

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator
from ift_tune.implicit.vectors import Tensors, add, norm, sub


@dataclass(frozen=True)
class State:
    """What an inverse computes once per operator, to serve many right-hand sides.

    Attributes:
        operator: The operator that is inverted, its damping included.
        eigenpair: The estimate of the largest eigenvalue, where the inverse needs one; given to
            the next `init` it makes the next estimate cheap.
        spent: Products that `init` took.
    """

    operator: Operator
    eigenpair: Eigenpair | None = None
    spent: int = 0


@dataclass(frozen=True)
class SolveStats:
    """What a solve cost and how far it got. Fields that a method does not learn are None.

    Attributes:
        hvps: Hessian-vector products spent, those of `init` included.
        residual_norm: ‖v − H·q‖, or an upper bound of it (`Neumann`).
        relative_residual: The same divided by ‖v‖.
        alpha: The step α used (`Neumann`).
        largest_eigenvalue: An estimate of λ_max from below.
        seconds: Wall time.
    """

    hvps: int = 0
    residual_norm: float | None = None
    relative_residual: float | None = None
    alpha: float | None = None
    largest_eigenvalue: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class InverseResult:
    """q ≈ H⁻¹v with its status and its cost; never a bare vector."""

    value: list[Tensor]
    status: SolveStatus
    stats: SolveStats = field(default_factory=SolveStats)


@dataclass(frozen=True)
class Inverse(abc.ABC):
    """An approximation of H⁻¹, chosen as a frozen, picklable object.

    Laws, checked by the tests for every inverse: the result has the vector's shapes; `solve` is
    linear in the vector (unless `linear` is False) and does not change its arguments.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    """Whether solving for the correction of a guess improves the guess."""

    @abc.abstractmethod
    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return how many products `init` and `solve` take at most, but for a guess.

        Args:
            weights: P.
            previous: Whether `init` is given an eigenpair.
        """

    @final
    def init(self, operator: Operator, previous: Eigenpair | None = None) -> State:
        """Do the work that is shared by all right-hand sides.

        Args:
            operator: The curvature of the training loss.
            previous: The eigenpair of an earlier outer step.
        """
        before = operator.products
        state = self._init(operator, previous)
        return replace(state, spent=operator.products - before)

    @final
    def solve(self, state: State, vector: Tensors, guess: Tensors | None = None) -> InverseResult:
        """Return q ≈ H⁻¹·vector.

        Args:
            state: From `init`.
            vector: v.
            guess: A q to start from, for one product more: the correction solves
                H·(q − guess) = v − H·guess. Not used by an inverse that does not refine, nor if
                its residual is larger than v itself.
        """
        before = state.operator.products
        length = float(norm(vector))
        result = None
        if guess is not None and self.refines:
            remainder = sub(vector, state.operator.matvec(guess))
            if float(norm(remainder)) <= length:  # else the guess is worse than none
                result = self._solve(state, remainder, length)
                result = replace(result, value=add(guess, result.value))
        if result is None:
            result = self._solve(state, vector, length)
        if not math.isfinite(length):
            result = replace(result, status=SolveStatus.NONFINITE)
        hvps = state.spent + state.operator.products - before
        return replace(result, stats=replace(result.stats, hvps=hvps))

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        return State(operator)

    @abc.abstractmethod
    def _solve(self, state: Any, vector: Tensors, length: float) -> InverseResult:
        """Return q ≈ H⁻¹·vector; residuals are relative to `length`, the norm of the whole v."""


def relative(residual: float, vector_norm: float) -> float:
    """Return the residual relative to the right-hand side; 0 for a right-hand side of 0."""
    return 0.0 if vector_norm == 0.0 else residual / vector_norm
