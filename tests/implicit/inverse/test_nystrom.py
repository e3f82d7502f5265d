"""The Nyström inverse against the dense damped inverse."""

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
from ift_tune.implicit.inverse import InverseResult, Nystrom
from ift_tune.testing import random_spd

LAW = settings(derandomize=True, deadline=None, max_examples=20)


def vector_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def solve(inverse: Nystrom, matrix: Tensor, vector: Tensor) -> InverseResult:
    return inverse.solve(inverse.init(Matrix(matrix)), [vector])


def damped_solution(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    identity = torch.eye(len(vector), dtype=matrix.dtype)
    found: Tensor = torch.linalg.solve(matrix + damping * identity, vector)
    return found


def low_rank(size: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    found: Tensor = factor @ factor.T / size
    return found


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("size", "condition"), [(1, 1.0), (6, 10.0), (25, 1e4)])
def test_full_rank_is_the_damped_inverse(damping: float, size: int, condition: float) -> None:
    matrix, vector = random_spd(size, condition=condition, seed=size), vector_of(size)
    found = solve(Nystrom(rank=size, damping=damping), matrix, vector).value[0]
    assert error(found, damped_solution(matrix, vector, damping)) < 1e-8


@LAW
@given(
    rank=st.integers(1, 6),
    extra=st.integers(0, 4),
    damping=st.floats(1e-3, 10.0),
    seed=st.integers(0, 1000),
)
def test_exact_for_a_matrix_of_no_larger_rank(
    rank: int, extra: int, damping: float, seed: int
) -> None:
    matrix, vector = low_rank(15, rank, seed), vector_of(15, seed)
    inverse = Nystrom(rank=rank + extra, damping=damping)
    found = solve(inverse, matrix, vector).value[0]
    assert error(found, damped_solution(matrix, vector, damping)) < 1e-6


def test_too_low_a_rank_is_not_exact() -> None:
    matrix, vector = low_rank(15, 6), vector_of(15)
    found = solve(Nystrom(rank=3, damping=0.01), matrix, vector).value[0]
    assert error(found, damped_solution(matrix, vector, 0.01)) > 0.1


def test_a_high_rank_is_closer_than_a_low_one() -> None:
    matrix, vector = random_spd(20, condition=1e3), vector_of(20)
    truth = damped_solution(matrix, vector, 0.1)
    low, high = (
        error(solve(Nystrom(rank=k, damping=0.1), matrix, vector).value[0], truth) for k in (2, 15)
    )
    assert high < 0.5 * low


def test_spends_rank_products_once_and_none_per_vector() -> None:
    inverse, operator = Nystrom(rank=4), Matrix(random_spd(9))
    state = inverse.init(operator)
    assert operator.products == 4
    inverse.solve(state, [vector_of(9)])
    inverse.solve(state, [vector_of(9, 1)])
    assert operator.products == 4


def test_rank_beyond_the_number_of_weights_costs_no_more() -> None:
    operator = Matrix(random_spd(5))
    Nystrom(rank=50).init(operator)
    assert operator.products == 5


def test_sketch_depends_on_the_seed_alone() -> None:
    matrix, vector = random_spd(12), vector_of(12)
    before = torch.get_rng_state()
    first, again, other = (
        solve(Nystrom(rank=3, sketch_seed=s), matrix, vector).value[0] for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_negative_curvature_is_left_out_and_reported() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64))
    result = solve(Nystrom(rank=3, damping=0.1), matrix, vector_of(3))
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert bool(torch.isfinite(result.value[0]).all())
    assert solve(Nystrom(rank=2), random_spd(4), vector_of(4)).status is SolveStatus.TRUNCATED


@pytest.mark.parametrize("seed", range(3))
def test_tiny_damping_in_single_precision_does_not_break_down(seed: int) -> None:
    matrix, vector = 10.0 * random_spd(40, condition=1e6).float(), vector_of(40).float()
    inverse = Nystrom(rank=40, damping=1e-12, sketch_seed=seed)
    assert bool(torch.isfinite(solve(inverse, matrix, vector).value[0]).all())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"damping": 0.0}, "damping must be a finite number above 0"),
        ({"sketch_seed": -1}, "sketch_seed must be an integer of at least 0"),
    ],
)
def test_nonsense_is_refused_when_built(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Nystrom(**arguments)
