"""The exact inverse against `torch.linalg`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Matrix
from ift_tune.implicit.inverse import Dense, InverseResult
from ift_tune.testing import random_spd

LAW = settings(derandomize=True, deadline=None, max_examples=20)


def vector_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def solve(inverse: Dense, matrix: Tensor, vector: Tensor) -> InverseResult:
    return inverse.solve(inverse.init(Matrix(matrix)), [vector])


@LAW
@given(
    size=st.integers(1, 12),
    condition=st.floats(1.0, 1e6),
    damping=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_equals_the_solution_of_torch(
    size: int, condition: float, damping: float, seed: int
) -> None:
    matrix, vector = random_spd(size, condition=condition, seed=seed), vector_of(size, seed)
    result = solve(Dense(damping=damping), matrix, vector)
    truth = torch.linalg.solve(matrix + damping * torch.eye(size, dtype=torch.float64), vector)
    torch.testing.assert_close(result.value[0], truth, rtol=1e-8, atol=1e-8)
    assert result.status is SolveStatus.CONVERGED
    assert result.stats.largest_eigenvalue == pytest.approx(
        float(torch.linalg.eigvalsh(matrix)[-1]) + damping
    )


@LAW
@given(size=st.integers(2, 10), missing=st.integers(1, 9), seed=st.integers(0, 1000))
def test_singular_matrices_get_their_pseudo_inverse(size: int, missing: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = max(size - missing, 0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q[
        :, :rank
    ]
    values = torch.linspace(0.5, 2.0, rank, dtype=torch.float64)
    matrix, vector = basis @ torch.diag(values) @ basis.T, vector_of(size, seed)
    result = solve(Dense(), matrix, vector)
    assert result.status is SolveStatus.SINGULAR
    truth = basis @ ((basis.T @ vector) / values)
    torch.testing.assert_close(result.value[0], truth, rtol=1e-10, atol=1e-11)
    residual = float((vector - matrix @ truth).norm())
    assert result.stats.residual_norm == pytest.approx(residual, rel=1e-9)
    assert solve(Dense(damping=0.1), matrix, vector).status is SolveStatus.CONVERGED


def test_indefinite_systems_are_solved_and_reported() -> None:
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    result = solve(Dense(), matrix, vector_of(2))
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    torch.testing.assert_close(result.value[0], torch.linalg.solve(matrix, vector_of(2)))


def test_one_factorisation_serves_many_vectors() -> None:
    inverse, operator = Dense(), Matrix(random_spd(6))
    state = inverse.init(operator)
    spent = operator.products
    for seed in range(3):
        found = inverse.solve(state, [vector_of(6, seed)]).value[0]
        torch.testing.assert_close(found, torch.linalg.solve(operator.matrix, vector_of(6, seed)))
    assert operator.products == spent


def test_large_problems_are_refused_before_any_product() -> None:
    operator = Matrix(random_spd(6))
    with pytest.raises(UsageError, match=r"6 × 6 matrix; use ConjugateGradient.* above 5"):
        Dense(max_weights=5).init(operator)
    assert operator.products == 0
    Dense(max_weights=6).init(operator)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"damping": -1.0}, "damping must be a finite number of at least 0"),
        ({"max_weights": 0}, "max_weights must be an integer of at least 1"),
    ],
)
def test_nonsense_is_refused_when_built(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Dense(**arguments)
