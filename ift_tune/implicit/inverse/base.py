"""An inverse-Hessian approximation: `init(operator)`, then `solve(state, vector)`."""

from __future__ import annotations

import abc
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, final

import torch
from torch import Tensor
from typing_extensions import Self, TypeVar

from ift_tune.base.errors import renamed, renamed_method
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import (
    Eigenpair,
    Estimate,
    Operator,
    Precondition,
    dual_length,
    no_precondition,
)
from ift_tune.implicit.reading import Later, choose, choose_or_zero
from ift_tune.implicit.vectors import Tensors, add, div, largest_entry, mul, norm, sub

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """What an inverse computes once per operator, to serve many right-hand sides.

    Attributes:
        operator: The operator that is inverted, its damping included.
        eigenpair: The estimate of the largest eigenvalue, where the inverse needs one; given to
            the next `init` it makes the next estimate cheap.
        spent: Products that `init` took.
        precondition: v ↦ M⁻¹v, where the inverse has a preconditioner.
        estimate: The same as `eigenpair`, in its place while it is on a device and unread.
    """

    operator: Operator
    eigenpair: Eigenpair | None = None
    spent: int = 0
    precondition: Precondition = no_precondition
    estimate: Estimate | None = None

    @property
    def largest(self) -> Eigenpair | Estimate | None:
        """What is known of the largest eigenvalue, read or not."""
        return self.estimate or self.eigenpair

    def norm(self, vector: Tensors) -> float:
        """Return the length that residuals are measured by: √(vᵀM⁻¹v), Euclidean where M = I."""
        return float(self.length(vector))

    def length(self, vector: Tensors) -> Tensor:
        """Return `norm` of a vector without a wait for it."""
        return dual_length(vector, self.precondition(vector))


# The squares of lengths between these, and of their thousandths, are numbers in float32.
_SMALL, _LARGE = 1e-12, 1e12
_SLACK = 2.0  # a residual measured again, in other sums, is not the same to the last digit
_TOLERANCE = 1e-3  # of an inverse without a setting of that name

_OVERTAKEN = 1.05  # times an eigenvalue's estimate: what is above is another eigenvalue, not noise

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
        smallest_eigenvalue: One of λ_min from above, likewise (`Neumann`).
        seconds: Wall time.
    """

    hvps: int = 0
    residual_norm: float | None = None
    relative_residual: float | None = None
    alpha: float | None = None
    largest_eigenvalue: float | None = None
    smallest_eigenvalue: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class InverseResult:
    """q ≈ H⁻¹v with its status and its cost; never a bare vector."""

    value: list[Tensor]
    status: SolveStatus
    stats: SolveStats = field(default_factory=SolveStats)


@dataclass(frozen=True)
class Unread:
    """q ≈ H⁻¹v, and its status and its cost once their numbers are read.

    Attributes:
        value: q.
        result: All of it.
    """

    value: list[Tensor]
    result: Later[InverseResult]


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
    waits: ClassVar[bool] = True
    """Whether `_solve` takes `length` as a number and returns an `InverseResult`, so that it waits
    for a device. Else it takes a tensor, float64 of shape (), and returns what is `Unread`."""
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

    def max_further_hvps(self, weights: int) -> int:
        """Return how many products `_solve` takes at most for one more right-hand side.

        An inverse that does its work in `init` overrides this: by default all is taken again.

        Args:
            weights: P.
        """
        return self.max_hvps(weights, previous=True)

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
        return self.begin(state, vector, guess).result.read()

    @final
    def begin(self, state: StateT, vector: Tensors, guess: Tensors | None = None) -> Unread:
        """Return the same as `solve`, with its numbers unread: the device goes on meanwhile."""
        length = state.length(vector)
        if length.is_cpu and _SMALL < float(length) < _LARGE:
            return self._run(state, vector, guess, length)
        # The squares of very small or large numbers are 0 or ∞: what is solved is of length 1.
        size = largest_entry(vector).double()
        usual = (length > _SMALL) & (length < _LARGE)
        size = torch.where(usual | ~((size > 0.0) & (size < math.inf)), 1.0, size)
        unit, guess = div(vector, size), None if guess is None else div(guess, size)
        begun = self._run(state, unit, guess, state.length(unit))

        def enlarged(numbers: list[float]) -> InverseResult:
            result = begun.result.make(numbers[1:])
            residual = result.stats.residual_norm
            norm = None if residual is None else numbers[0] * residual
            stats = replace(result.stats, residual_norm=norm)
            return replace(result, value=value, stats=stats)

        value = mul(begun.value, size)
        return Unread(value, Later([size, *begun.result.tensors], enlarged))

    def _run(self, state: StateT, vector: Tensors, guess: Tensors | None, length: Tensor) -> Unread:
        before = begun = state.operator.products
        rest, start = vector, None
        if guess is not None and self.refines:
            remainder = sub(vector, state.operator.matvec(guess))
            begun = state.operator.products
            closer = state.length(remainder) <= length  # else the guess is worse than none
            rest, start = choose(closer, remainder, vector), choose_or_zero(closer, guess)
        solved = self._solved(state, rest, length)
        value = solved.value if start is None else add(start, solved.value)
        # Steps that were not taken have changed nothing.
        always = self.measured == "always" and state.operator.products > begun
        if always and length.is_cpu:  # where a look costs nothing, what is lost costs no product
            lost = solved.result.read().status is SolveStatus.NONFINITE
            always = bool(length) and not lost
        true = [self._true_residual(state, vector, value, length)] if always else []
        hvps = state.spent + state.operator.products - before

        def finish(numbers: list[float]) -> InverseResult:
            size, *others = numbers
            residual = others.pop() if always else None
            result = replace(solved.result.make(others), value=value)
            spent = hvps
            if not math.isfinite(size):
                result = replace(result, status=SolveStatus.NONFINITE)
            elif self.measured == "claimed" and result.status is SolveStatus.CONVERGED:
                products = state.operator.products
                residual = float(self._true_residual(state, vector, value, length))
                spent += state.operator.products - products
            if residual is not None:
                result = self.verified(result, residual, size)
            return replace(result, stats=replace(result.stats, hvps=spent))

        return Unread(value, Later([length, *solved.result.tensors, *true], finish))

    def _solved(self, state: StateT, vector: Tensors, length: Tensor) -> Unread:
        """Return what `_solve` does, whichever of its two forms it has."""
        found = self._solve(state, vector, float(length) if self.waits else length)
        if isinstance(found, Unread):
            return found
        return Unread(found.value, Later.known(found))

    def _true_residual(
        self, state: StateT, vector: Tensors, value: list[Tensor], length: Tensor
    ) -> Tensor:
        """Return ‖v − H·q‖, by a product."""
        nothing = norm(value) == 0.0  # a solve that stopped at its first direction
        if nothing.is_cpu and bool(nothing):
            return length
        residual = state.length(sub(vector, state.operator.matvec(value)))
        return torch.where(nothing, length, residual)

    def verified(self, result: InverseResult, residual: float, length: float) -> InverseResult:
        """Return a result with its true residual, and called converged only if that says so.

        A recurrence knows nothing of what rounding has done to it: in bfloat16 it goes on falling
        where the true residual stands still.
        """
        if result.status is SolveStatus.NONFINITE or not length:
            return result
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

    def handed_on(self, state: StateT, stats: SolveStats) -> Eigenpair | None:
        """Return what the next `init` is given: the estimate of λ_max, unless the solve saw more.

        A power iteration that goes on from a vector (nearly) orthogonal to the present top
        eigenvector would miss it for many outer steps, and an α chosen by it would make the series
        diverge.
        """
        pair = state.eigenpair
        return None if pair is None or overtaken(abs(pair.value), stats) else pair

    @abc.abstractmethod
    def _init(self, operator: Operator, previous: Eigenpair | None) -> StateT:
        """Return the state; the products taken are counted by `init`."""

    @abc.abstractmethod
    def _solve(self, state: StateT, vector: Tensors, length: Any) -> InverseResult | Unread:
        """Return q ≈ H⁻¹·vector; residuals are relative to `length`, the norm of the whole v.

        See `waits` for the two forms of `length` and of what is returned.
        """


def overtaken(magnitude: float, stats: SolveStats) -> bool:
    """Return whether a solve has seen a larger eigenvalue than the estimate that it went by."""
    largest = stats.largest_eigenvalue
    if largest is None or largest <= _OVERTAKEN * magnitude:
        return False
    _log.debug(
        "eigenvector not handed on: eigenvalue %.3g, the solve has seen %.3g", magnitude, largest
    )
    return True


def relative(residual: float, vector_norm: float) -> float:
    """Return the residual relative to the right-hand side; 0 for a right-hand side of 0."""
    return 0.0 if vector_norm == 0.0 else residual / vector_norm


def _bare_state(self: Inverse[State], operator: Operator, previous: Eigenpair | None) -> State:
    return State(operator)
