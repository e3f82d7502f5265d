"""A low-rank Nyström approximation of H, inverted in closed form together with a damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ift_tune.base.arguments import known_keywords, take_plain
from ift_tune.base.errors import require_integer, require_number
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator, damped
from ift_tune.implicit.inverse.base import Inverse, InverseResult, State, Unread
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import (
    Tensors,
    common_dtype,
    count,
    flatten,
    unflatten,
)


@dataclass(frozen=True, kw_only=True)
class NystromState(State):
    """The low-rank factor of the approximation.

    Attributes:
        basis: U of shape (P, r), r ≤ rank, orthonormal, with H ≈ U·diag(values)·Uᵀ.
        values: Eigenvalues of the approximation, shape (r,), at least 0.
        negative: Whether the sketch met negative curvature, which the approximation leaves out.
        finite: Whether all of the sketch is; else the values are NaN.
    """

    basis: Tensor
    values: Tensor
    negative: Tensor
    finite: Tensor


@known_keywords()
@dataclass(frozen=True)
class Nystrom(Inverse[NystromState]):
    """q = (B·Bᵀ + damping·I)⁻¹v, where B·Bᵀ ≈ H is the rank-k Nyström approximation.

    With an orthonormal random Ω of shape (P, k): Y = HΩ and B·Bᵀ = Y(ΩᵀY)⁻¹Yᵀ (Hataya and Yamada,
    AISTATS 2023, sample k columns of H, which is Ω made of unit vectors; a Gaussian Ω sees every
    weight and costs the same k products). B is made from the eigenvectors of ΩᵀY, and
    inverted in its singular vectors. Directions outside B are treated as having curvature 0, so
    `damping` decides how far they go. Memory: P·k numbers.

    Attributes:
        rank: k, at least 1; never more than the number of weights is used.
        damping: Above 0; digits are lost once it is below about 1e-8 of the largest eigenvalue.
        sketch_seed: Of Ω; the same seed gives the same answer.

    Raises:
        UsageError: If a value is out of range.

    Example:
        >>> import torch
        >>> from ift_tune import Nystrom, hypergradient
        >>> w, decay = (torch.tensor([x], requires_grad=True) for x in (2.0, 4.0))
        >>> train, val = (decay * w.square()).sum(), w.sum()  # H = 2·decay = 8
        >>> result = hypergradient(train, val, [w], [decay], inverse=Nystrom(rank=1, damping=0.01))
        >>> result.grads, result.stats.hvps  # −v·(H + damping)⁻¹·2w, by one product
        ([tensor([-0.4994])], 1)
    """

    name: ClassVar[str] = "nystrom"
    summary: ClassVar[str] = "a low-rank model of H with a damping, inverted in closed form"
    # With D = (BBᵀ + δI)⁻¹, a correction turns the error e into (I − DH)e. Outside the sketch that
    # is (1 − λ/δ)e, which grows wherever an eigenvalue λ left out exceeds 2δ.
    refines: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    measured: ClassVar[Literal["always", "claimed", "never"]] = "never"  # and none is reported
    steps_field: ClassVar[str | None] = "rank"

    rank: int = 10
    damping: float = 0.01
    sketch_seed: int = 0

    def __post_init__(self) -> None:
        take_plain(self)
        require_integer("rank", self.rank, 1)
        require_number("damping", self.damping, above=0.0)
        require_integer("sketch_seed", self.sketch_seed, 0)

    @classmethod
    def examples(cls) -> list[Self]:
        """Return ranks below and above the number of weights of the tests."""
        return [cls(), cls(rank=3, damping=0.1), cls(rank=100, sketch_seed=1)]

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return the rank that is used."""
        return min(self.rank, weights)

    def max_further_hvps(self, weights: int) -> int:
        """Return 0: the sketch serves all."""
        return 0

    def _init(self, operator: Operator, previous: Eigenpair | None) -> NystromState:
        """Spend `rank` products on the sketch and factorise it."""
        like = operator.like[0]
        size = count(operator.like)
        generator = torch.Generator().manual_seed(self.sketch_seed)
        shape = (size, min(self.rank, size))
        dtype = common_dtype(operator.like)
        gaussian = torch.randn(shape, generator=generator, dtype=dtype).to(like.device)
        omega = torch.linalg.qr(gaussian).Q
        sketch = torch.stack(
            [flatten(operator.matvec(unflatten(w, operator.like))) for w in omega.T.contiguous()], 1
        )
        core = omega.T @ sketch
        finite = torch.isfinite(core).all()
        core, sketch = (torch.where(finite, part, 0.0) for part in (core, sketch))
        # With ΩᵀY = VΣVᵀ, Y(ΩᵀY)⁻¹Yᵀ = BBᵀ for B = YVΣ^(−1/2). Directions whose σ is rounding, or
        # negative, have no such root and are left out. In low precision products are not symmetric:
        # what is not shows how much of σ is noise.
        scales, inner = torch.linalg.eigh(0.5 * (core + core.T))
        noise = torch.linalg.matrix_norm(core - core.T)
        cutoff = torch.maximum(10.0 * operator.rounding * scales.abs().max(), noise)
        # A column of zeros is left out as well: a singular value of 0, a direction like any other.
        roots = torch.where(scales > cutoff, scales, torch.inf).rsqrt()
        basis, singular, _ = torch.linalg.svd(sketch @ (inner * roots), full_matrices=False)
        return NystromState(
            operator=damped(operator, self.damping),
            basis=basis,
            values=torch.where(finite, singular.square(), torch.nan),
            negative=(scales < -cutoff).any(),
            finite=finite,
        )

    def _solve(self, state: NystromState, vector: Tensors, length: Tensor) -> Unread:
        """Return q = U(values + damping)⁻¹Uᵀv + (v − UUᵀv)/damping.

        Not by the Woodbury identity, which subtracts numbers of size v/damping from each other. No
        product is spent on the residual, so none is reported.
        """
        flat = flatten(vector).to(state.basis.dtype)
        inside = state.basis.T @ flat
        outside = flat - state.basis @ inside
        # Once more: what rounding has left inside would be divided by a small damping.
        outside = outside - state.basis @ (state.basis.T @ outside)
        solution = state.basis @ (inside / (state.values + self.damping)) + outside / self.damping
        answer = unflatten(solution, vector)

        def judged(numbers: list[float]) -> InverseResult:
            finite, negative = numbers
            if not finite:
                return InverseResult(answer, SolveStatus.NONFINITE)
            status = SolveStatus.NEGATIVE_CURVATURE if negative else SolveStatus.TRUNCATED
            return InverseResult(answer, status)

        return Unread(answer, Later([state.finite, state.negative], judged))
