"""The truncated Neumann series: the inverse of Lorraine, Vicol and Duvenaud (2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ift_tune.base.arguments import known_keywords, take_plain
from ift_tune.base.errors import UsageError, require_integer, require_number
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import (
    Eigenpair,
    Operator,
    estimate_largest,
    ritz_interval,
)
from ift_tune.implicit.inverse.base import (
    Inverse,
    InverseResult,
    SolveStats,
    State,
    Unread,
    overtaken,
    relative,
)
from ift_tune.implicit.preconditioner import (
    DiagonalPreconditioner,
    NoPreconditioner,
    Preconditioner,
    require_preconditioner,
)
from ift_tune.implicit.reading import Later, choose_or_zero
from ift_tune.implicit.vectors import Tensors, add, axpy, dot, joined, mul

GROWTH_LIMIT = 1e6  # beside a term this many times the first, float32 holds nothing else
_TAME = GROWTH_LIMIT**2  # of squared lengths

_MILD = (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)
# The Rayleigh quotient's error falls with (λ₂/λ₁)^(2·steps): 12 steps come within some percent of a
# net's λ_max, and H moves so little between outer steps that 2 follow it from the last eigenvector.
_COLD_POWER_STEPS = 12
_WARM_POWER_STEPS = 2
# The moments of so many terms have as many Ritz values, which find λ_max faster than a power
# iteration does: the series itself then follows λ_max from one outer step to the next.
_TELLING_TERMS = 3
# What an estimate falls to in an outer step at least: one vector may miss the top eigenvector.
_FALL = 0.9
# Of λ_max: a negative eigenvalue that is more than the rounding and the noise of a batch.
_INDEFINITE = 0.1


@known_keywords()
@dataclass(frozen=True)
class Neumann(Inverse[State]):
    """H⁻¹ ≈ α Σ_{j=0..K} (I − αH)^j, by K loop passes (K + 1 summands, K products).

    The series converges if and only if every eigenvalue of H lies in (0, 2/α). Algorithm 3 of
    Lorraine, Vicol, Duvenaud 2020 (arXiv 1911.02590), with the final factor α, so that the answer
    approximates H⁻¹v and not H⁻¹v/α.

    Attributes:
        terms: K, the number of loop passes, at least 0; 0 gives αv.
        alpha: α, above 0; or ``"auto"``, the default, kept as None: α = 1/λ_max.
        alpha_scale: c in (0, 2), for α = c/λ_max. The first time λ_max is from power iteration, by
            12 products. Afterwards the last series tells it, by the Ritz values that its terms give
            for nothing; one of fewer than 3 terms does not, and where H is clearly indefinite α
            follows too slowly so: there 2 products go on from the last eigenvector. Free of
            dimension, so a value found on one model carries to another. Give this or `alpha`;
            neither means auto, c = 1.
        tolerance: Relative residual at which the status is CONVERGED; the K passes are always run.
        preconditioner: M, for the series α Σ (I − αM⁻¹H)^j M⁻¹v, which converges if and only if
            the eigenvalues of M⁻¹H lie in (0, 2/α). α and λ_max are then those of M⁻¹H.

    Raises:
        UsageError: If a value is out of range, or both `alpha` and `alpha_scale` are given.

    Example:
        >>> import torch
        >>> from ift_tune import Neumann, hypergradient
        >>> w, decay = (torch.tensor([x], requires_grad=True) for x in (2.0, 4.0))
        >>> train, val = (decay * w.square()).sum(), w.sum()  # H = 2·decay = 8
        >>> result = hypergradient(train, val, [w], [decay], inverse=Neumann(terms=20, alpha=0.05))
        >>> result.grads, result.status.value, result.stats.hvps  # −v·H⁻¹·2w
        ([tensor([-0.5000])], 'converged', 21)
    """

    name: ClassVar[str] = "neumann"
    summary: ClassVar[str] = "a series of K products, robust where weights are not at a minimum"
    steps_field: ClassVar[str | None] = "terms"
    waits: ClassVar[bool] = False
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("alpha", "alpha_scale"),)

    terms: int = 5
    alpha: float | Literal["auto"] | None = None
    alpha_scale: float | None = None
    tolerance: float = 1e-3
    preconditioner: Preconditioner = field(default_factory=NoPreconditioner)

    def __post_init__(self) -> None:
        take_plain(self)
        require_integer("terms", self.terms, 0)
        require_number("tolerance", self.tolerance, above=0.0)
        require_preconditioner(self.preconditioner)
        if self.alpha is not None and self.alpha_scale is not None:
            raise UsageError("give alpha or alpha_scale, not both: alpha_scale sets α = c/λ_max")
        if isinstance(self.alpha, str):
            if self.alpha != "auto":
                raise UsageError(f"alpha must be a number above 0 or 'auto', got {self.alpha!r}")
            object.__setattr__(self, "alpha", None)  # one spelling, so that equal means equal
        elif self.alpha is not None:
            require_number("alpha", self.alpha, above=0.0)
        if self.alpha_scale is not None:
            require_number("alpha_scale", self.alpha_scale, above=0.0)
            if self.alpha_scale >= 2.0:
                raise UsageError(
                    f"alpha_scale must be below 2, where the series diverges, "
                    f"got {self.alpha_scale!r}"
                )

    @classmethod
    def examples(cls) -> list[Self]:
        """Return short, long, damped and divergent series, with α given and found, and with M."""
        return [
            cls(),
            cls(terms=0),
            cls(terms=2, alpha=0.05),
            cls(terms=4, alpha_scale=0.5),
            cls(terms=150, alpha_scale=1.8),
            cls(terms=3, alpha=1e9),
            cls(terms=150, preconditioner=DiagonalPreconditioner(probes=1)),
            cls(terms=2, alpha=0.05, preconditioner=DiagonalPreconditioner()),
        ]

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return K, the preconditioner's, and the power iteration's where α is automatic."""
        own = self.terms + self.preconditioner.max_hvps()
        return own if isinstance(self.alpha, float | int) else own + power_steps(previous)

    def max_further_hvps(self, weights: int) -> int:
        """Return K."""
        return self.terms

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        """Estimate λ_max by power iteration, unless α is given or the last series has told it."""
        precondition = self.preconditioner.near(operator)
        if isinstance(self.alpha, float | int):
            return State(operator, precondition=precondition)
        if previous is not None and not previous.vector:
            return State(operator, previous, precondition=precondition)
        found = estimate_largest(
            operator,
            steps=power_steps(previous is not None),
            start=previous,
            precondition=precondition,
        )
        if found.value.is_cpu:  # read for nothing
            pair = Eigenpair(float(found.value), found.vector)
            return State(operator, pair, precondition=precondition)
        return State(operator, precondition=precondition, estimate=found)

    def step_size(self, state: State) -> float:
        """Return α for the operator of `state`."""
        return float(self._step_size(state))

    def _step_size(self, state: State) -> float | Tensor:
        if isinstance(self.alpha, float | int):
            return float(self.alpha)
        # Where H is indefinite its largest |λ| counts: α = c/|λ| bounds every |1 − αλ| by 1 + c.
        # The estimate is the length of a product, which no cancellation makes small.
        scale = 1.0 if self.alpha_scale is None else self.alpha_scale
        if state.estimate is not None:
            value = state.estimate.value.abs()
            return torch.where((value > 0.0) & (value < math.inf), scale / value, scale)
        magnitude = abs(state.eigenpair.value) if state.eigenpair is not None else 0.0
        return scale / magnitude if 0.0 < magnitude < math.inf else scale

    def _solve(self, state: State, vector: Tensors, length: Tensor) -> Unread:
        """Sum the series; say whether it diverges or meets negative curvature.

        The residual reported is that of K − 1 passes, ‖(I − αHM⁻¹)^K v‖ in the norm of M⁻¹. One
        product more would give that of K, which is smaller wherever the series converges.
        """
        alpha = self._step_size(state)
        # r_j = (I − αHM⁻¹)^j v by r_{j+1} = r_j − αH·z_j with z_j = M⁻¹r_j, and q = αΣ_j z_j.
        term = vector
        image = state.precondition(term)
        total = image
        # With A = I − αM^(−1/2)HM^(−1/2), symmetric, and u = M^(−1/2)v: moments[j] = uᵀA^j u, which
        # are the inner products of neighbours, z_i·r_i = moments[2i], z_i·r_{i+1} = moments[2i+1].
        before = joined(image)  # z_i, for the inner products
        moments = [dot(before, before if image is term else joined(term))]
        limit = _TAME * moments[0].double()
        alive: Tensor | None = None
        for _ in range(self.terms):
            following = axpy(term, -alpha, state.operator.matvec(image))
            image = state.precondition(following)
            now = joined(following)
            moments.append(dot(before, now))
            before = now if image is following else joined(image)
            moments.append(dot(before, now))
            term = following
            tame = moments[-1] <= limit
            if tame.is_cpu and not bool(tame):
                break
            # On a device the passes after the last tame one are made and not added.
            alive = tame if alive is None or tame.is_cpu else alive & tame
            if (more := choose_or_zero(alive, image)) is not None:
                total = add(total, more)
        value = state.largest.value if state.largest is not None else 0.0
        # What an earlier step has left is no bound of this one's eigenvalues.
        own = state.largest is not None and bool(state.largest.vector)
        unknown = [x for x in (length, alpha, value) if isinstance(x, Tensor)]

        def judged(numbers: list[float]) -> InverseResult:
            known = iter(numbers)
            told = [next(known) if isinstance(x, Tensor) else x for x in (length, alpha, value)]
            size, step, eigenvalue = told
            rounding = state.operator.rounding
            estimate = eigenvalue if own else None
            return InverseResult(
                answer, *self.judge_series(list(known), step, estimate, size, rounding)
            )

        answer = mul(total, alpha)
        return Unread(answer, Later([*unknown, *moments], judged))

    def judge_series(
        self,
        moments: list[float],
        alpha: float,
        eigenvalue: float | None,
        length: float,
        rounding: float,
    ) -> tuple[SolveStatus, SolveStats]:
        """Return what the inner products of a series' terms say of it.

        Args:
            moments: uᵀA^j u, as `_solve` collects them.
            alpha: α.
            eigenvalue: The estimate of λ_max at this operator, with its sign; None without one.
            length: Of the whole right-hand side.
            rounding: The relative error of a product.
        """
        moments = moments[: tame_moments(moments)]
        residual = math.sqrt(max(moments[-1], 0.0))
        seen = _contraction_interval(moments, rounding)
        estimates = [eigenvalue] if eigenvalue is not None and eigenvalue > 0.0 else []
        estimates += [(1.0 - seen[0]) / alpha] if seen is not None else []
        stats = SolveStats(
            residual_norm=residual,
            relative_residual=relative(residual, length),
            alpha=alpha,
            largest_eigenvalue=max(estimates, default=None),
            smallest_eigenvalue=None if seen is None else (1.0 - seen[1]) / alpha,
        )
        growth = relative(residual, math.sqrt(moments[0]))
        status = self._status(stats, growth, seen, slack=10.0 * math.sqrt(rounding))
        if eigenvalue is not None and not math.isfinite(eigenvalue):
            status = SolveStatus.NONFINITE
        elif eigenvalue is not None and eigenvalue < 0.0 and status in _MILD:
            status = SolveStatus.NEGATIVE_CURVATURE
        return status, stats

    def handed_on(self, state: State, stats: SolveStats) -> Eigenpair | None:
        """Return the estimate of λ_max for the next outer step, with no vector if Ritz values tell.

        It rises at once with what the series has seen, and falls slowly: a vector that has missed
        the top eigenvector for some steps must not make the next series diverge. Where the Hessian
        is clearly indefinite, the next outer step takes products of its own, as the first does.
        """
        if state.largest is None:
            return None
        steps = state.spent - self.preconditioner.max_hvps()
        return self.next_estimate(state.largest.vector, steps, stats)

    def next_estimate(
        self, vector: list[Tensor], steps: int, stats: SolveStats
    ) -> Eigenpair | None:
        """Return the same, where α was found.

        Args:
            vector: Of the estimate that α was chosen by; empty for a value alone.
            steps: Products of the power iteration that has found it.
            stats: Of the solve.
        """
        if stats.alpha is None:
            return None
        scale = 1.0 if self.alpha_scale is None else self.alpha_scale
        before = scale / stats.alpha
        # What went on from an eigenvector goes on so: runs of before Ritz values were asked.
        if self.terms < _TELLING_TERMS or (vector and steps <= _WARM_POWER_STEPS):
            return None if overtaken(before, stats) else Eigenpair(before, vector)
        if stats.largest_eigenvalue is None or stats.smallest_eigenvalue is None:
            return Eigenpair(before, [])
        low, high = abs(stats.smallest_eigenvalue), abs(stats.largest_eigenvalue)
        # Far from a minimum the spectrum changes too much from one outer step to the next.
        if stats.smallest_eigenvalue < -_INDEFINITE * high:
            return Eigenpair(before, vector) if vector else None
        finite = [x for x in (low, high) if x < math.inf]
        return Eigenpair(max([*finite, _FALL * before]) if finite else before, [])

    def _status(
        self,
        stats: SolveStats,
        growth: float,
        seen: tuple[float, float] | None,
        slack: float,
    ) -> SolveStatus:
        """Judge the series by its growth and by the eigenvalues seen of I − αH.

        A last term longer than the first proves an eigenvalue of I − αH outside [−1, 1]. Where the
        Ritz values do not show that it is above 1 (H negative there), α is taken to be too large.
        """
        # A's eigenvalues are 1 − αλ with λ of M⁻¹H: below −1 means αλ > 2, above 1 means λ < 0.
        low, high = seen or (0.0, 0.0)
        if math.isnan(growth):
            return SolveStatus.NONFINITE
        if low < -1.0 - slack:
            return SolveStatus.DIVERGED
        if high > 1.0 + slack:
            return SolveStatus.NEGATIVE_CURVATURE
        if growth > 1.0 + slack:
            return SolveStatus.DIVERGED
        residual = stats.relative_residual
        converged = residual is not None and residual <= self.tolerance
        return SolveStatus.CONVERGED if converged else SolveStatus.TRUNCATED


def power_steps(previous: bool) -> int:
    """Return how many steps estimate λ_max, with an earlier eigenvector at hand or without."""
    return _WARM_POWER_STEPS if previous else _COLD_POWER_STEPS


def tame_moments(moments: Sequence[float]) -> int:
    """Return how many moments there are up to the first term that is not tame, with that."""
    untamed = (j for j in range(2, len(moments), 2) if not moments[j] <= moments[0] * _TAME)
    return next(untamed, len(moments) - 1) + 1


def _contraction_interval(moments: list[float], precision: float) -> tuple[float, float] | None:
    """Return bounds from inside of the eigenvalues of I − αH, from the first and last terms.

    None where the moments tell nothing.
    """
    if len(moments) == 1 or moments[0] == 0.0 or not math.isfinite(sum(moments)):
        return None
    even = len(moments) - len(moments) % 2
    # The first terms hold all directions of v, the last those that have grown beside the rest. More
    # than 16 moments tell no more: their Hankel matrix is singular to rounding by then.
    first = moments[: min(16, even)]
    start = max(0, even - 4)  # even, so that the window starts at a term of the series
    last = moments[start:even]
    intervals = [ritz_interval(w, precision) for w in (first, last) if w[0] > 0.0]
    return min(low for low, _ in intervals), max(high for _, high in intervals)
