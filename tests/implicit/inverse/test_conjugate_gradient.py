"""Conjugate gradient against the dense solution and its own theory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Matrix
from ift_tune.implicit.inverse import ConjugateGradient, InverseResult
from ift_tune.testing import random_spd

LAW = settings(derandomize=True, deadline=None, max_examples=20)


def vector_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def solve(inverse: ConjugateGradient, matrix: Tensor, vector: Tensor) -> InverseResult:
    return inverse.solve(inverse.init(Matrix(matrix)), [vector])


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


@LAW
@given(size=st.integers(2, 12), condition=st.floats(1.0, 1e4), seed=st.integers(0, 1000))
def test_error_falls_in_the_energy_norm(size: int, condition: float, seed: int) -> None:
    matrix, vector = random_spd(size, condition=condition, seed=seed), vector_of(size, seed)
    truth = torch.linalg.solve(matrix, vector)
    errors = [float(truth @ matrix @ truth)]
    for steps in range(1, size + 1):
        found = solve(ConjugateGradient(max_steps=steps, tolerance=1e-12), matrix, vector).value[0]
        errors.append(float((truth - found) @ matrix @ (truth - found)))
    floor = 1e-18 * errors[0]
    assert all(
        after <= before * (1.0 + 1e-9) + floor for before, after in itertools.pairwise(errors)
    )
    assert errors[1] < errors[0]


def test_as_many_steps_as_distinct_eigenvalues_suffice() -> None:
    matrix, vector = diagonal(1.0, 1.0, 4.0, 4.0, 9.0, 9.0), vector_of(6)
    two, three = (
        solve(ConjugateGradient(max_steps=k, tolerance=1e-10), matrix, vector) for k in (2, 3)
    )
    assert (two.status, three.status) == (SolveStatus.TRUNCATED, SolveStatus.CONVERGED)
    torch.testing.assert_close(three.value[0], torch.linalg.solve(matrix, vector))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-10])
def test_stops_as_soon_as_the_tolerance_is_met(tolerance: float) -> None:
    matrix, vector = random_spd(40, condition=1000.0), vector_of(40)
    inverse = ConjugateGradient(max_steps=500, tolerance=tolerance)
    operator = Matrix(matrix)
    result = inverse.solve(inverse.init(operator), [vector])
    assert result.status is SolveStatus.CONVERGED
    residual = float((vector - matrix @ result.value[0]).norm() / vector.norm())
    assert residual <= tolerance * (1.0 + 1e-3)
    assert result.stats.relative_residual == pytest.approx(residual, rel=1e-2)
    # One of the products has measured the residual.
    fewer = ConjugateGradient(max_steps=operator.products - 2, tolerance=tolerance)
    short = solve(fewer, matrix, vector)
    assert short.status is SolveStatus.TRUNCATED
    assert float((vector - matrix @ short.value[0]).norm() / vector.norm()) > tolerance


def test_few_steps_do_not_solve_an_ill_conditioned_system() -> None:
    matrix, vector = random_spd(50, condition=1e5), vector_of(50)
    result = solve(ConjugateGradient(max_steps=3), matrix, vector)
    truth = torch.linalg.solve(matrix, vector)
    assert result.status is SolveStatus.TRUNCATED
    assert float((result.value[0] - truth).norm() / truth.norm()) > 0.5


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damping_solves_the_damped_system(damping: float) -> None:
    matrix, vector = random_spd(10, condition=100.0), vector_of(10)
    inverse = ConjugateGradient(max_steps=100, tolerance=1e-13, damping=damping)
    truth = torch.linalg.solve(matrix + damping * torch.eye(10, dtype=torch.float64), vector)
    torch.testing.assert_close(solve(inverse, matrix, vector).value[0], truth)


def test_negative_curvature_at_once_gives_zero_and_says_so() -> None:
    matrix, vector = diagonal(-1.0, -2.0, 0.5), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    operator, inverse = Matrix(matrix), ConjugateGradient()
    result = inverse.solve(inverse.init(operator), [vector])
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert not bool(result.value[0].any())
    assert operator.products == 1
    assert result.stats.relative_residual == 1.0


def test_negative_curvature_later_keeps_the_iterate_before_it() -> None:
    matrix = diagonal(2.0, 1.0, -0.1)
    vector = torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    result = solve(ConjugateGradient(max_steps=20), matrix, vector)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert bool(result.value[0].any())
    before = [solve(ConjugateGradient(max_steps=k), matrix, vector) for k in range(1, 4)]
    last = [r.value[0] for r in before if r.status is SolveStatus.TRUNCATED][-1]
    assert torch.equal(result.value[0], last)


def test_a_direction_without_curvature_stops_too() -> None:
    matrix, vector = diagonal(0.0, 1.0), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert solve(ConjugateGradient(), matrix, vector).status is SolveStatus.SINGULAR


def test_damping_beyond_the_most_negative_eigenvalue_mends_it() -> None:
    matrix, vector = diagonal(-0.5, 1.0, 2.0), vector_of(3)
    assert solve(ConjugateGradient(damping=0.4), matrix, vector).status is (
        SolveStatus.NEGATIVE_CURVATURE
    )
    result = solve(ConjugateGradient(damping=0.6, tolerance=1e-12), matrix, vector)
    assert result.status is SolveStatus.CONVERGED
    truth = torch.linalg.solve(matrix + 0.6 * torch.eye(3, dtype=torch.float64), vector)
    torch.testing.assert_close(result.value[0], truth)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_steps": 0}, "max_steps must be an integer of at least 1"),
        ({"tolerance": 0.0}, "tolerance must be a finite number above 0"),
        ({"tolerance": float("inf")}, "got inf"),
        ({"damping": -0.1}, "damping must be a finite number of at least 0"),
    ],
)
def test_nonsense_is_refused_when_built(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ConjugateGradient(**arguments)
