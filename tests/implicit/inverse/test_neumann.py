"""The Neumann series against the explicit sum of matrix powers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, Matrix
from ift_tune.implicit.inverse import InverseResult, Neumann
from ift_tune.implicit.vectors import flatten
from ift_tune.testing import random_spd

LAW = settings(derandomize=True, deadline=None, max_examples=30)
MEANINGLESS = (SolveStatus.DIVERGED, SolveStatus.NONFINITE, SolveStatus.NEGATIVE_CURVATURE)


def vector_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def solve(inverse: Neumann, matrix: Tensor, vector: Tensor) -> InverseResult:
    return inverse.solve(inverse.init(Matrix(matrix)), [vector])


def series(matrix: Tensor, vector: Tensor, terms: int, alpha: float) -> Tensor:
    """α Σ_{j=0..K} (I − αH)^j v by explicit matrix powers."""
    step = torch.eye(len(vector), dtype=matrix.dtype) - alpha * matrix
    powers = [torch.linalg.matrix_power(step, j) @ vector for j in range(terms + 1)]
    total: Tensor = alpha * torch.stack(powers).sum(0)
    return total


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian).Q
    matrix: Tensor = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    return matrix


@pytest.mark.parametrize("terms", [0, 1, 3, 20])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 1.9])
def test_equals_the_explicit_series(terms: int, alpha: float) -> None:
    matrix, vector = random_spd(7, condition=30.0), vector_of(7)
    found = flatten(solve(Neumann(terms=terms, alpha=alpha), matrix, vector).value)
    torch.testing.assert_close(found, series(matrix, vector, terms, alpha), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 2.0])
def test_no_pass_gives_alpha_times_the_vector(alpha: float) -> None:
    matrix, vector = random_spd(4), vector_of(4)
    result = solve(Neumann(terms=0, alpha=alpha), matrix, vector)
    assert torch.equal(result.value[0], alpha * vector)
    assert result.status is SolveStatus.TRUNCATED
    assert result.stats.relative_residual == 1.0


@LAW
@given(
    terms=st.integers(0, 15),
    scale=st.floats(0.01, 1.9),
    size=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_one_more_pass_adds_one_more_power(terms: int, scale: float, size: int, seed: int) -> None:
    matrix, vector = random_spd(size, seed=seed), vector_of(size, seed)
    fewer, more = (
        flatten(solve(Neumann(terms=k, alpha=scale), matrix, vector).value)
        for k in (terms, terms + 1)
    )
    # q_{K+1} = αv + (I − αH) q_K
    recursion = scale * vector + fewer - scale * (matrix @ fewer)
    torch.testing.assert_close(more, recursion, rtol=1e-10, atol=1e-12)


@LAW
@given(
    terms=st.integers(0, 30),
    product=st.floats(0.01, 2.0),
    condition=st.floats(1.0, 1e4),
    seed=st.integers(0, 1000),
)
def test_reported_residual_bounds_the_true_one(
    terms: int, product: float, condition: float, seed: int
) -> None:
    matrix, vector = random_spd(6, condition=condition, seed=seed), vector_of(6, seed)
    alpha = product / float(torch.linalg.eigvalsh(matrix)[-1])
    result = solve(Neumann(terms=terms, alpha=alpha), matrix, vector)
    residual = float((vector - matrix @ result.value[0]).norm())
    bound = result.stats.residual_norm
    assert bound is not None
    assert residual <= bound * (1.0 + 1e-9) + 1e-12


@LAW
@given(
    terms=st.integers(1, 40),
    product=st.floats(0.01, 1.999),
    condition=st.floats(1.0, 1e4),
    size=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_a_convergent_series_is_never_called_divergent(
    terms: int, product: float, condition: float, size: int, seed: int
) -> None:
    matrix, vector = random_spd(size, condition=condition, seed=seed), vector_of(size, seed)
    alpha = product / float(torch.linalg.eigvalsh(matrix)[-1])
    result = solve(Neumann(terms=terms, alpha=alpha), matrix, vector)
    assert result.status not in MEANINGLESS
    error = result.stats.relative_residual
    assert error is not None
    assert (result.status is SolveStatus.CONVERGED) == (error <= 1e-3)


@LAW
@given(product=st.floats(2.02, 50.0), size=st.integers(2, 10), seed=st.integers(0, 1000))
def test_a_divergent_series_is_called_so(product: float, size: int, seed: int) -> None:
    matrix, vector = random_spd(size, seed=seed), vector_of(size, seed)
    alpha = product / float(torch.linalg.eigvalsh(matrix)[-1])
    result = solve(Neumann(terms=100, alpha=alpha), matrix, vector)
    assert result.status is SolveStatus.DIVERGED
    assert bool(torch.isfinite(result.value[0]).all())


@pytest.mark.parametrize("terms", [1, 3])
def test_divergence_shows_with_few_terms_when_the_vector_is_stiff(terms: int) -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))
    stiff = torch.tensor([1.0, 0.1], dtype=torch.float64)
    result = solve(Neumann(terms=terms, alpha=2.5), matrix, stiff)
    assert result.status is SolveStatus.DIVERGED
    assert "alpha" in result.status.advice


def test_divergence_stops_before_overflow_and_keeps_an_honest_residual() -> None:
    matrix, vector = random_spd(5), vector_of(5)
    operator = Matrix(matrix)
    inverse = Neumann(terms=5000, alpha=100.0)
    result = inverse.solve(inverse.init(operator), [vector])
    assert result.status is SolveStatus.DIVERGED
    assert operator.products < 20
    residual = float((vector - matrix @ result.value[0]).norm())
    assert result.stats.residual_norm == pytest.approx(residual, rel=1e-6)


@pytest.mark.parametrize("terms", [10, 15, 40, 200])
@pytest.mark.parametrize("negative", [-0.2, -1.0])
def test_negative_curvature_is_reported_however_far_it_has_grown(
    terms: int, negative: float
) -> None:
    """Every α·λ is below 2, so a smaller α, the advice for divergence, would not help."""
    matrix = with_spectrum([negative, 0.3, 0.6, 1.0])
    result = solve(Neumann(terms=terms, alpha=1.0), matrix, vector_of(4))
    assert result.status is SolveStatus.NEGATIVE_CURVATURE


def test_automatic_alpha_notices_a_dominant_negative_eigenvalue() -> None:
    matrix = with_spectrum([-1.0, 0.1, 0.2, 0.3])
    orthogonal = torch.linalg.eigh(matrix).eigenvectors[:, 3]
    result = solve(Neumann(terms=2), matrix, orthogonal)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE


def test_three_terms_do_not_suffice_on_an_ill_conditioned_system() -> None:
    matrix, vector = random_spd(20, condition=1000.0), vector_of(20)
    result = solve(Neumann(terms=3, alpha=1.0), matrix, vector)
    truth = torch.linalg.solve(matrix, vector)
    assert result.status is SolveStatus.TRUNCATED
    assert float((result.value[0] - truth).norm() / truth.norm()) > 0.9
    # Along the softest direction the sum reaches only 1 − (1 − 1/1000)⁴ of the answer.
    soft = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    reached = float((soft @ result.value[0]) / (soft @ truth))
    assert reached == pytest.approx(1.0 - 0.999**4, rel=1e-6)


def test_enough_terms_converge_and_say_so() -> None:
    matrix, vector = random_spd(8, condition=10.0), vector_of(8)
    result = solve(Neumann(terms=300, alpha=1.0), matrix, vector)
    assert result.status is SolveStatus.CONVERGED
    torch.testing.assert_close(
        result.value[0], torch.linalg.solve(matrix, vector), rtol=1e-10, atol=1e-10
    )


def test_tolerance_decides_what_is_called_converged() -> None:
    matrix, vector = random_spd(8, condition=10.0), vector_of(8)
    loose, strict = (
        solve(Neumann(terms=10, alpha=1.0, tolerance=t), matrix, vector) for t in (0.9, 1e-9)
    )
    assert torch.equal(loose.value[0], strict.value[0])
    assert (loose.status, strict.status) == (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)


@pytest.mark.parametrize("scale", [None, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_scaled_alpha_is_free_of_dimension(scale: float | None, magnitude: float) -> None:
    matrix, vector = with_spectrum([1.0, 0.1, 0.2, 0.3]), vector_of(4)
    inverse = Neumann(terms=4, alpha_scale=scale)
    result = solve(inverse, magnitude * matrix, vector)
    assert result.stats.alpha == pytest.approx((scale or 1.0) / magnitude, rel=1e-6)
    unit = solve(inverse, matrix, vector).value[0]
    torch.testing.assert_close(magnitude * result.value[0], unit, rtol=1e-6, atol=1e-9)


def test_automatic_alpha_is_one_over_the_estimate() -> None:
    matrix, vector = random_spd(9, condition=30.0), vector_of(9)
    inverse = Neumann(terms=3)
    operator = Matrix(matrix)
    state = inverse.init(operator)
    assert operator.products == 12
    assert state.eigenpair is not None
    result = inverse.solve(state, [vector])
    assert operator.products == 15
    alpha = 1.0 / state.eigenpair.value
    assert result.stats.alpha == alpha
    torch.testing.assert_close(result.value[0], series(matrix, vector, 3, alpha))
    assert result.stats.largest_eigenvalue is not None
    assert result.stats.largest_eigenvalue >= state.eigenpair.value


def test_a_known_eigenvector_makes_the_estimate_cheap_and_exact() -> None:
    matrix = random_spd(9, condition=30.0)
    values, vectors = torch.linalg.eigh(matrix)
    operator = Matrix(matrix)
    state = Neumann(alpha="auto").init(operator, Eigenpair(1.0, [vectors[:, -1]]))
    assert operator.products == 2
    assert state.eigenpair is not None
    assert state.eigenpair.value == pytest.approx(float(values[-1]), rel=1e-12)


def test_a_given_alpha_spends_no_product_before_the_series() -> None:
    operator = Matrix(random_spd(5))
    inverse = Neumann(terms=6, alpha=0.3)
    state = inverse.init(operator)
    assert operator.products == 0
    inverse.solve(state, [vector_of(5)])
    assert operator.products == 6


def test_a_vector_of_zero_teaches_nothing_about_the_spectrum() -> None:
    matrix = 0.5 * torch.eye(3, dtype=torch.float64)
    result = solve(Neumann(terms=3, alpha=0.1), matrix, torch.zeros(3, dtype=torch.float64))
    assert result.status is SolveStatus.CONVERGED
    assert (result.stats.largest_eigenvalue or 0.0) <= 0.5


def test_spellings_of_automatic_alpha_are_equal() -> None:
    assert Neumann(alpha="auto") == Neumann(alpha=None) == Neumann()
    assert Neumann(alpha_scale=1.0) != Neumann(alpha_scale=0.5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"terms": -1}, "terms must be an integer of at least 0, got -1"),
        ({"terms": 2.5}, "terms must be an integer"),
        ({"terms": True}, "terms must be an integer"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ({"alpha": -0.1}, "got -0.1"),
        ({"alpha": float("nan")}, "got nan"),
        ({"alpha": "best"}, "or 'auto', got 'best'"),
        ({"alpha_scale": 2.0}, "below 2"),
        ({"alpha_scale": 0.0}, "alpha_scale must be a finite number above 0"),
        ({"alpha": 0.1, "alpha_scale": 1.0}, "not both"),
        ({"alpha": "auto", "alpha_scale": 1.0}, "not both"),
        ({"tolerance": 0.0}, "tolerance must be a finite number above 0"),
    ],
)
def test_nonsense_is_refused_when_built(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Neumann(**arguments)


@pytest.mark.parametrize(
    ("last", "status"), [(30.0, SolveStatus.DIVERGED), (-20.0, SolveStatus.NEGATIVE_CURVATURE)]
)
def test_one_term_that_grows_is_proof_enough(last: float, status: SolveStatus) -> None:
    operator = Matrix(torch.diag(torch.tensor([1.0, last], dtype=torch.float64)))
    inverse = Neumann(terms=1, alpha=0.1)
    vector = [torch.tensor([1.0, 0.4], dtype=torch.float64)]
    result = inverse.solve(inverse.init(operator), vector)
    assert result.stats.relative_residual is not None
    assert result.stats.relative_residual > 1.0
    assert result.status is status
