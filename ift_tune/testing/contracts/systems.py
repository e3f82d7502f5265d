"""The systems that an inverse is checked on, and what their dense matrices say of a solve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ift_tune.implicit.curvature import Operator
from ift_tune.implicit.inverse import Inverse, InverseResult, State
from ift_tune.implicit.vectors import Tensors, flatten, mul, randn_like, unflatten
from ift_tune.testing.problems import random_spd

SIZE = 11  # equations, of three tensors
FINITE = ("definite", "ill-conditioned", "indefinite", "singular", "zero")
"""Of condition 10 and 1,000, with eigenvalues of both signs, of rank 7, all 0; the others are
``"nan"`` and ``"infinite"``. No eigenvalue is above 1."""


class Known(Operator):
    """A matrix whose products count, with a part on the diagonal that is known in closed form."""

    def __init__(self, matrix: Tensor, known: Tensor, dtype: torch.dtype, device: str) -> None:
        shapes = ((3, 2), (), (1, 2, 2))
        super().__init__([torch.zeros(s, dtype=dtype, device=device) for s in shapes])
        self.matrix, self.known = matrix.to(device, dtype), known.to(device, dtype)

    def _product(self, vector: Tensors) -> list[Tensor]:
        return unflatten(self.matrix @ flatten(vector), self.like)

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with the known part."""
        return unflatten(self.known * flatten(vector), self.like)


@cache
def _matrix(system: str) -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix with eigenvalues up to 1, and the known part of its diagonal."""
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    if system == "ill-conditioned":
        known = 1e-3 * known
    matrix = random_spd(SIZE, condition=1e3 if system == "ill-conditioned" else 8.0, seed=3)
    matrix = matrix + torch.diag(known)
    if system == "indefinite":
        matrix = matrix - 0.8 * torch.eye(SIZE, dtype=torch.float64)
    if system == "singular":
        values, vectors = torch.linalg.eigh(matrix)
        matrix = vectors[:, 4:] @ torch.diag(values[4:]) @ vectors[:, 4:].T
        known = torch.zeros_like(known)
    factor = {"zero": 0.0, "nan": float("nan"), "infinite": float("inf")}.get(system, 1.0)
    factor /= float(torch.linalg.matrix_norm(matrix, 2))
    return factor * 0.5 * (matrix + matrix.T), factor * known


def make_operator(system: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Known:
    """Return a system's matrix as an operator that counts its products."""
    return Known(*_matrix(system), dtype, device)


def draw_vector(operator: Operator, seed: int = 0) -> list[Tensor]:
    """Return a right-hand side for an operator."""
    vector = randn_like(operator.like, seed)
    vector[0] = vector[0].T.contiguous().T  # as autograd's gradients often are
    return vector


@dataclass(frozen=True)
class Solved:
    """A solve of one system."""

    operator: Known
    state: State
    vector: list[Tensor]
    result: InverseResult

    @property
    def q(self) -> Tensor:
        """The answer as one vector."""
        return flatten(self.result.value)

    def dense(self) -> Tensor:
        """Return the matrix that is inverted, its damping included."""
        return self.state.operator.dense()

    def residual(self) -> float:
        """Return ‖v − H·q‖ in the norm of the state, by the dense matrix."""
        flat = flatten(self.vector) - self.dense() @ self.q
        return self.state.norm(unflatten(flat, self.operator.like))

    def spectrum(self) -> Tensor:
        """Return the eigenvalues of M⁻¹H, those of the symmetric M^(−1/2)·H·M^(−1/2)."""
        like = self.operator.like
        identity = torch.eye(SIZE, dtype=like[0].dtype)
        columns = [flatten(self.state.precondition(unflatten(e, like))) for e in identity]
        values, vectors = torch.linalg.eigh(torch.stack(columns, 1))
        root: Tensor = vectors @ torch.diag(values.sqrt()) @ vectors.T
        eigenvalues: Tensor = torch.linalg.eigvalsh(root @ self.dense() @ root)
        return eigenvalues


def solve(
    inverse: Inverse,
    system: str,
    *,
    seed: int = 0,
    scale: float = 1.0,
    guess: Tensors | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Solved:
    """Solve a system, for a right-hand side that is `scale` times that of `seed`."""
    operator = make_operator(system, dtype, device)
    vector = mul(draw_vector(operator, seed), scale)
    state = inverse.init(operator)
    return Solved(operator, state, vector, inverse.solve(state, vector, guess))


def near(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    """Return whether two vectors differ by little beside their length."""
    length = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) <= tolerance * length + 1e-300
