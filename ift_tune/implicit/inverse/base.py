"""An inverse-Hessian approximation: `init(operator)`, then `solve(state, vector)`."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, final

from torch import Tensor
from typing_extensions import Self, TypeVar

from ift_tune.base.errors import renamed, renamed_method
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import (
    Eigenpair,
    Operator,
    Precondition,
    dual_norm,
    no_precondition,
)
from ift_tune.implicit.vectors import Tensors, add, div, largest_entry, mul, norm, sub


@dataclass(frozen=True)
class State:
    """What an inverse computes once per operator, to serve many right-hand sides.

    Attributes:
        operator: The operator that is inverted, its damping included.
        eigenpair: The estimate of the largest eigenvalue, where the inverse needs one; given to
            the next `init` it makes the next estimate cheap.
        spent: Products that `init` took.
        precondition: v ↦ M⁻¹v, where the inverse has a preconditioner.
    """

    operator: Operator
    eigenpair: Eigenpair | None = None
    spent: int = 0
    precondition: Precondition = no_precondition

    def norm(self, vector: Tensors) -> float:
        """Return the length that residuals are measured by: √(vᵀM⁻¹v), Euclidean where M = I."""
        return dual_norm(vector, self.precondition(vector))


# The squares of lengths between these, and of their thousandths, are numbers in float32.
_SMALL, _LARGE = 1e-12, 1e12
_SLACK = 2.0  # a residual measured again, in other sums, is not the same to the last digit
_TOLERANCE = 1e-3  # of an inverse without a setting of that name

StateT = TypeVar("StateT", bound=State, default=Any)


@dataclass(frozen=True)
class SolveStats:
    """What a solve cost and how far it got. Fields that a method does not learn are None.

    Attributes:
        hvps: Hessian-vector products spent, those of `init` included.
        residual_norm: ‖v − H·q‖ in the norm of `State.norm`, or an upper bound of it (`Neumann`).
        relative_residual: The same divided by ‖v‖ in that norm.
        alpha: The step α used (`Neumann`).
        largest_eigenvalue: An estimate of λ_max from below: of H, or of M⁻¹H with a preconditioner.
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
class Inverse(abc.ABC, Generic[StateT]):
    """An approximation of H⁻¹, chosen as a frozen, picklable object.

    A new one is a frozen dataclass with `max_hvps`, `_init` and `_solve`, whose fields are its
    settings. `testing.contracts.check_inverse` holds it to the laws of the family: the result has
    the vector's shapes, `solve` is linear in the vector (unless `linear` is False) and does not
    change its arguments, statuses and residuals are true, and so on.

    Example:
        >>> import torch
        >>> from ift_tune import Hessian, Inverse, Neumann
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> loss = (torch.tensor([0.5, 1.0]) * w.square()).sum()  # H = diag(1, 2)
        >>> gradient = torch.autograd.grad(loss, [w], create_graph=True)
        >>> inverse: Inverse = Neumann(terms=50)
        >>> state = inverse.init(Hessian(gradient, [w]))
        >>> result = inverse.solve(state, [torch.tensor([1.0, 1.0])])
        >>> [round(x, 3) for x in result.value[0].tolist()], result.status.value
        ([1.0, 0.5], 'converged')
    """

    name: ClassVar[str]
    """In search spaces, tables and on the command line."""
    summary: ClassVar[str] = ""
    """What it is and when to use it, in one line."""
    linear: ClassVar[bool] = True
    """Whether `solve` is linear in the vector."""
    refines: ClassVar[bool] = True
    """Whether solving for the correction of a guess improves the guess."""
    steps_field: ClassVar[str | None] = None
    """The field that says how many products the solve takes; None where no field does."""
    measured: ClassVar[Literal["always", "claimed", "never"]] = "claimed"
    """When `solve` measures the true residual, by one product more: always, where `_solve` has it
    from a recurrence, which rounding drives away from the true one; when `_solve` claims to have
    converged; or never, where its own is true."""
    full_length: ClassVar[Mapping[str, float]] = {}
    """The settings with which nothing ends a solve before that number, for studies over it."""
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of fields of which at most one may be given."""

    def __init_subclass__(cls) -> None:
        """Accept a subclass that still has the old name of `max_hvps`."""
        super().__init_subclass__()
        if "most_products" in vars(cls) and "max_hvps" not in vars(cls):
            # At the class statement: between it and here is the metaclass's `__new__`.
            renamed(f"{cls.__name__}.most_products", "max_hvps", stacklevel=4)
            cls.max_hvps = cls.most_products  # type: ignore[method-assign]
            if getattr(cls._init, "__isabstractmethod__", False):  # it was optional then
                cls._init = _bare_state  # type: ignore[method-assign,assignment]

    @classmethod
    def examples(cls) -> list[Self]:
        """Return instances that the tests run on, among them settings at the edge.

        An inverse that refines has one among them that solves a well-conditioned system.
        """
        return [cls()]

    @abc.abstractmethod
    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return how many products `init` and `_solve` take at most.

        A guess takes one more in `solve`, and so does the residual where it is `measured`.

        Args:
            weights: P.
            previous: Whether `init` is given an eigenpair.
        """

    most_products = renamed_method("most_products", "max_hvps")

    @final
    def init(self, operator: Operator, previous: Eigenpair | None = None) -> StateT:
        """Do the work that is shared by all right-hand sides.

        Args:
            operator: The curvature of the training loss.
            previous: The eigenpair of an earlier outer step.
        """
        before = operator.products
        state = self._init(operator, previous)
        return replace(state, spent=operator.products - before)

    @final
    def solve(self, state: StateT, vector: Tensors, guess: Tensors | None = None) -> InverseResult:
        """Return q ≈ H⁻¹·vector.

        Args:
            state: From `init`.
            vector: v.
            guess: A q to start from, for one product more: the correction solves
                H·(q − guess) = v − H·guess. Not used by an inverse that does not refine, nor if
                its residual is larger than v itself.
        """
        if _SMALL < state.norm(vector) < _LARGE:
            return self._run(state, vector, guess)
        size = largest_entry(vector)
        if not 0.0 < size < math.inf:
            return self._run(state, vector, guess)
        # The squares of very small or large numbers are 0 or ∞: what is solved is of length 1.
        unit = None if guess is None else div(guess, size)
        result = self._run(state, div(vector, size), unit)
        residual = result.stats.residual_norm
        stats = replace(result.stats, residual_norm=None if residual is None else size * residual)
        return replace(result, value=mul(result.value, size), stats=stats)

    def _run(self, state: StateT, vector: Tensors, guess: Tensors | None) -> InverseResult:
        before = state.operator.products
        length = state.norm(vector)
        result, begun = None, before
        if guess is not None and self.refines:
            remainder = sub(vector, state.operator.matvec(guess))
            begun = state.operator.products
            if state.norm(remainder) <= length:  # else the guess is worse than none
                result = self._solve(state, remainder, length)
                result = replace(result, value=add(guess, result.value))
        if result is None:
            result = self._solve(state, vector, length)
        if not math.isfinite(length):
            result = replace(result, status=SolveStatus.NONFINITE)
        elif (self.measured == "always" and state.operator.products > begun) or (
            self.measured == "claimed" and result.status is SolveStatus.CONVERGED
        ):  # steps that were not taken have changed nothing
            result = self._verified(state, vector, result, length)
        hvps = state.spent + state.operator.products - before
        return replace(result, stats=replace(result.stats, hvps=hvps))

    def _verified(
        self, state: StateT, vector: Tensors, result: InverseResult, length: float
    ) -> InverseResult:
        """Return a result with its true residual, and called converged only if that says so.

        A recurrence knows nothing of what rounding has done to it: in bfloat16 it goes on falling
        where the true residual stands still.
        """
        if result.status is SolveStatus.NONFINITE or not length:
            return result
        nothing = float(norm(result.value)) == 0.0  # a solve that stopped at its first direction
        residual = (
            length if nothing else state.norm(sub(vector, state.operator.matvec(result.value)))
        )
        return self.judged(result, residual, length)

    def judged(self, result: InverseResult, residual: float, length: float) -> InverseResult:
        """Return a result with its measured residual, and called converged only if that says so."""
        stats = replace(
            result.stats, residual_norm=residual, relative_residual=relative(residual, length)
        )
        status: SolveStatus = result.status
        tolerance = float(getattr(self, "tolerance", _TOLERANCE))
        if not math.isfinite(residual):
            status = SolveStatus.NONFINITE
        elif status is SolveStatus.CONVERGED and residual > _SLACK * tolerance * length:
            status = SolveStatus.TRUNCATED
        return replace(result, status=status, stats=stats)

    @abc.abstractmethod
    def _init(self, operator: Operator, previous: Eigenpair | None) -> StateT:
        """Return the state; the products taken are counted by `init`."""

    @abc.abstractmethod
    def _solve(self, state: StateT, vector: Tensors, length: float) -> InverseResult:
        """Return q ≈ H⁻¹·vector; residuals are relative to `length`, the norm of the whole v."""


def relative(residual: float, vector_norm: float) -> float:
    """Return the residual relative to the right-hand side; 0 for a right-hand side of 0."""
    return 0.0 if vector_norm == 0.0 else residual / vector_norm


def _bare_state(self: Inverse[State], operator: Operator, previous: Eigenpair | None) -> State:
    return State(operator)
