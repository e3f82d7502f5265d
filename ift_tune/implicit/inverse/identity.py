"""H⁻¹ ≈ I: the cheapest hypergradient, no Hessian-vector product at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.inverse.base import Inverse, InverseResult, State
from ift_tune.implicit.vectors import Tensors


@dataclass(frozen=True)
class Identity(Inverse):
    """q = v (the "T1-T2" method of Luketina et al. 2016). No α is applied."""

    name: ClassVar[str] = "identity"

    refines: ClassVar[bool] = False

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return 0."""
        return 0

    def _solve(self, state: State, vector: Tensors, length: float) -> InverseResult:
        """Return the vector itself; nothing is learned about the residual."""
        return InverseResult(list(vector), SolveStatus.TRUNCATED)
