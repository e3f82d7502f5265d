"""Preconditioners M ≈ H that cost next to nothing: the series and CG then see M⁻¹H instead of H."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, final

import torch
from torch import Tensor
from typing_extensions import Self, TypeVar

from ift_tune.base.arguments import known_keywords, take_plain
from ift_tune.base.errors import UsageError, require_integer
from ift_tune.implicit.curvature import Operator, Precondition
from ift_tune.implicit.vectors import Tensors, add, carried, sub, zeros_like

StateT = TypeVar("StateT", default=Any)


@dataclass(frozen=True)
class Preconditioner(abc.ABC, Generic[StateT]):
    """A choice of M, symmetric and positive definite, whose inverse is cheap to apply.

    With M near H the eigenvalues of M⁻¹H lie closer together than those of H, so fewer terms of a
    series, or steps of conjugate gradient, do the same. The answer they tend to is the same.

    Example:
        One of one's own needs `max_hvps`, `init` and `apply`:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from ift_tune import ConjugateGradient, Preconditioner, hypergradient
        >>> @dataclass(frozen=True)
        ... class Penalised(Preconditioner):  # M = I + the penalty's diagonal
        ...     name = "penalised"
        ...     def max_hvps(self):
        ...         return 0
        ...     def init(self, operator):
        ...         ones = [torch.ones_like(x) for x in operator.like]
        ...         return [1.0 + d for d in operator.penalty_matvec(ones)]
        ...     def apply(self, state, vector):
        ...         return [v / d for v, d in zip(vector, state)]
        >>> w, decay = (torch.tensor([x], requires_grad=True) for x in (2.0, 4.0))
        >>> train, val = (decay * w.square()).sum(), w.sum()
        >>> inverse = ConjugateGradient(preconditioner=Penalised())
        >>> hypergradient(train, val, [w], [decay], inverse=inverse).grads
        [tensor([-0.5000])]
    """

    name: ClassVar[str]
    """In flat configurations, under the key ``preconditioner``."""
    summary: ClassVar[str]
    """What it is, in one line."""

    @classmethod
    def examples(cls) -> list[Self]:
        """Return instances that the tests run on, among them settings at the edge."""
        return [cls()]

    @abc.abstractmethod
    def max_hvps(self) -> int:
        """Return how many Hessian-vector products `init` takes at most."""

    @abc.abstractmethod
    def init(self, operator: Operator) -> StateT:
        """Do the work that is shared by all vectors.

        Args:
            operator: What M is to be near, over P weights, its damping included.
        """

    @abc.abstractmethod
    def apply(self, state: StateT, vector: Tensors) -> Tensors:
        """Return M⁻¹·vector, of the shapes of `vector`, which is not changed."""

    @final
    def near(self, operator: Operator) -> Precondition:
        """Return v ↦ M⁻¹v for the M of `operator`."""
        return functools.partial(self.apply, self.init(operator))


@known_keywords()
@dataclass(frozen=True)
class NoPreconditioner(Preconditioner[None]):
    """M = I: nothing is changed and nothing is spent.

    Example:
        >>> from ift_tune import Neumann, NoPreconditioner
        >>> Neumann() == Neumann(preconditioner=NoPreconditioner())
        True
    """

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "M = I"

    def max_hvps(self) -> int:
        """Return 0."""
        return 0

    def init(self, operator: Operator) -> None:
        """Do nothing."""

    def apply(self, state: None, vector: Tensors) -> Tensors:
        """Return the vector."""
        return vector


@known_keywords()
@dataclass(frozen=True)
class DiagonalPreconditioner(Preconditioner[list[Tensor]]):
    """M = diag(p), the penalty's curvature, and with probes the mean of the loss's by tensor.

    p is the diagonal of the penalty's curvature in closed form, which costs no product: worth
    having where its strengths differ between weights, as learned decays do. Where all are equal, or
    there is no penalty, M is a number, and nothing changes but the scale of α.

    With probes, M has beside p a constant for each tensor of n weights: the mean curvature of the
    data loss, tr(H_data)/n, estimated after Hutchinson 1990 with vectors z of ±1, for which
    E[z ⊙ H_data·z] = diag(H_data).

    Attributes:
        probes: Products spent on that estimate at each outer step.

    Raises:
        UsageError: If `probes` is not a whole number of at least 0.

    Example:
        >>> from ift_tune import DiagonalPreconditioner, MetaConfig, Neumann
        >>> config = MetaConfig(inverse=Neumann(preconditioner=DiagonalPreconditioner(probes=2)))
        >>> flat = config.to_flat()
        >>> flat["preconditioner"], flat["probes"]
        ('diagonal', 2)
    """

    name: ClassVar[str] = "diagonal"
    summary: ClassVar[str] = "the penalty's curvature, where decays differ between weights"

    probes: int = 0

    def __post_init__(self) -> None:
        take_plain(self)
        require_integer("probes", self.probes, 0)

    @classmethod
    def examples(cls) -> list[Self]:
        """Return one without probes, and some with."""
        return [cls(), cls(probes=1), cls(probes=3)]

    def max_hvps(self) -> int:
        """Return `probes`."""
        return self.probes

    def init(self, operator: Operator) -> list[Tensor]:
        """Return the diagonal of M, of the shapes of the weights, above 0."""
        generator = torch.Generator().manual_seed(_SEED)
        penalty, data = zeros_like(operator.like), zeros_like(operator.like)
        for _ in range(max(self.probes, 1)):
            probe = _signs(operator.like, generator)
            # z ⊙ Dz = d exactly for a diagonal D, as z² = 1, and a penalty that is a sum over the
            # weights has such a one; for any other this is Hutchinson's estimate as well, for free.
            closed = operator.penalty_matvec(probe)
            penalty = add(penalty, list(torch._foreach_mul(probe, closed)))
            if self.probes:
                rest = sub(operator.matvec(probe), closed)
                data = add(data, list(torch._foreach_mul(probe, rest)))
        # An entry of z ⊙ Hz has a variance of Σ_{j≠i} H_ij², far above H_ii² for a net. The mean of
        # the n entries of a tensor has about 1/n of that: one probe is enough for it.
        scale = 1.0 / max(self.probes, 1)
        return _positive(
            [scale * (p + d.mean().clamp(min=0.0)) for p, d in zip(penalty, data, strict=True)]
        )

    def apply(self, state: list[Tensor], vector: Tensors) -> list[Tensor]:
        """Return the vector divided by the diagonal."""
        return list(torch._foreach_div(list(vector), state))


_SEED = 0  # the same probes at every outer step: M moves with H alone, as the eigenvector kept does
_LEAST = 1e-4  # of the largest entry: what no curvature is known of must not outweigh all the rest


def _signs(like: Tensors, generator: torch.Generator) -> list[Tensor]:
    """Return tensors of ±1, drawn on the CPU so that all devices see the same."""
    bits = [torch.randint(0, 2, x.shape, generator=generator, dtype=x.dtype) for x in like]
    return carried([2.0 * x - 1.0 for x in bits], like)


def _positive(diagonal: list[Tensor]) -> list[Tensor]:
    """Return the diagonal, its entries raised to a small part of the largest; 1 if all are 0.

    NaN where one is not finite, which the solve will report.
    """
    largest = torch.stack([d.max().double() for d in diagonal if d.numel()]).max()
    whole = torch.where(torch.isfinite(largest), 1.0, torch.nan)
    least = torch.where(largest > 0.0, _LEAST * largest, 1.0) * whole
    return [torch.maximum(d, least.to(d.dtype)) for d in diagonal]


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    kind.name: kind for kind in (NoPreconditioner, DiagonalPreconditioner)
}
"""Every preconditioner by its name."""


def require_preconditioner(value: object) -> None:
    """Raise a `UsageError` unless `value` is a preconditioner."""
    if not isinstance(value, Preconditioner):
        raise UsageError(
            f"preconditioner must be an object such as DiagonalPreconditioner(), got {value!r}"
        )
