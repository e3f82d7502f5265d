"""H⁻¹ ≈ I: the cheapest hypergradient, no Hessian-vector product at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ift_tune.base.arguments import known_keywords
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Operator
from ift_tune.implicit.inverse.base import Inverse, InverseResult, State
from ift_tune.implicit.vectors import Tensors


@known_keywords()
@dataclass(frozen=True)
class Identity(Inverse[State]):
    """q = v (the "T1-T2" method of Luketina et al. 2016). No α is applied.

    Example:
        >>> import torch
        >>> from ift_tune import Identity, hypergradient
        >>> w, decay = (torch.tensor([x], requires_grad=True) for x in (2.0, 3.0))
        >>> train, val = (decay * w.square()).sum(), w.sum()
        >>> hypergradient(train, val, [w], [decay], inverse=Identity()).grads  # −v·2w
        [tensor([-4.])]
    """

    name: ClassVar[str] = "identity"
    summary: ClassVar[str] = "q = v, no product: the cheapest; with a scale-free outer optimiser"
    refines: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    measured: ClassVar[Literal["always", "claimed", "never"]] = "never"  # and none is reported

    def max_hvps(self, weights: int, previous: bool) -> int:
        """Return 0."""
        return 0

    def _init(self, operator: Operator, previous: Eigenpair | None) -> State:
        return State(operator)

    def _solve(self, state: State, vector: Tensors, length: Tensor) -> InverseResult:
        """Return the vector itself; nothing is learned about the residual."""
        return InverseResult(list(vector), SolveStatus.TRUNCATED)
