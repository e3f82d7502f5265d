"""The laws of the family, on every inverse in `INVERSES`: a new one is covered when it is added."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Hessian, Matrix, Operator
from ift_tune.implicit.inverse import (
    INVERSES,
    ConjugateGradient,
    Dense,
    Identity,
    Inverse,
    Neumann,
    Nystrom,
)
from ift_tune.implicit.vectors import flatten, randn_like, sub
from ift_tune.testing import random_spd
from ift_tune.testing.minimise import minimise

LAW = settings(derandomize=True, deadline=None, max_examples=15)
NAMES = sorted(INVERSES)
PRECISE: list[tuple[Inverse, float]] = [
    (Neumann(terms=500, alpha_scale=1.8), 1e-6),
    (ConjugateGradient(max_steps=200, tolerance=1e-13), 1e-10),
    (Nystrom(rank=64, damping=1e-8), 1e-5),
    (Dense(), 1e-10),
]
"""Settings that solve any system of condition 50 or less, and the relative error they reach."""
PRECISE_NAMES = [inverse.name for inverse, _ in PRECISE]


class Counted(Operator):
    """A product with any function, over vectors of several shapes."""

    def __init__(self, factor: float) -> None:
        super().__init__([torch.zeros(2, 3, dtype=torch.float64)])
        self.factor = factor

    def _product(self, vector: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return [self.factor * v for v in vector]


def system(size: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    return random_spd(size, condition=condition, seed=seed), vector


def solve(inverse: Inverse, matrix: Tensor, vector: Tensor) -> Tensor:
    operator = Matrix(matrix)
    return flatten(inverse.solve(inverse.init(operator), [vector]).value)


def shapes() -> list[Tensor]:
    return [torch.zeros(s, dtype=torch.float64) for s in ((3, 2), (), (1, 2, 2))]


@pytest.mark.parametrize("name", NAMES)
def test_choice_is_a_frozen_picklable_named_object(name: str) -> None:
    inverse = INVERSES[name]()
    assert inverse.name == name
    assert pickle.loads(pickle.dumps(inverse)) == inverse
    assert hash(inverse) == hash(INVERSES[name]())
    for field in dataclasses.fields(inverse):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(inverse, field.name, getattr(inverse, field.name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_default_halves_the_residual_of_an_easy_system(name: str, size: int) -> None:
    matrix, vector = system(size, 2.0, seed=size)
    matrix = matrix / torch.linalg.eigvalsh(matrix)[-1]
    solution = solve(INVERSES[name](), matrix, vector)
    assert float((vector - matrix @ solution).norm()) <= 0.5 * float(vector.norm())
    assert float(vector @ solution) > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_kept_and_nothing_is_changed(name: str) -> None:
    inverse, operator = INVERSES[name](), Matrix(random_spd(11), shapes())
    vector = randn_like(shapes(), 1)
    vector[0] = vector[0].T.contiguous().T  # as autograd's gradients often are
    assert not vector[0].is_contiguous()
    before, versions = [v.clone() for v in vector], [v._version for v in vector]
    state = inverse.init(operator)
    first = inverse.solve(state, vector).value
    again = inverse.solve(state, vector).value
    assert [(q.shape, q.dtype) for q in first] == [(v.shape, v.dtype) for v in vector]
    assert [v._version for v in vector] == versions
    assert all(torch.equal(v, b) for v, b in zip(vector, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(operator.matrix, random_spd(11))


@pytest.mark.parametrize("name", NAMES)
def test_splitting_a_vector_into_tensors_changes_nothing(name: str) -> None:
    inverse = INVERSES[name]()
    matrix, vector = random_spd(11, seed=2), randn_like(shapes(), 2)
    whole = solve(inverse, matrix, flatten(vector))
    state = inverse.init(Matrix(matrix, shapes()))
    if state.eigenpair is not None:  # the power iteration draws its start tensor by tensor
        state = dataclasses.replace(state, eigenpair=inverse.init(Matrix(matrix)).eigenpair)
    parts = flatten(inverse.solve(state, vector).value)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if INVERSES[n].linear])
@LAW
@given(seed=st.integers(0, 1000), scale=st.floats(-5.0, 5.0), condition=st.floats(1.0, 100.0))
def test_solve_is_linear_in_the_vector(
    name: str, seed: int, scale: float, condition: float
) -> None:
    inverse = INVERSES[name]()
    matrix, a = system(8, condition, seed)
    _, b = system(8, condition, seed + 1)
    state = inverse.init(Matrix(matrix))
    qa, qb, both = (flatten(inverse.solve(state, [v]).value) for v in (a, b, a + scale * b))
    torch.testing.assert_close(both, qa + scale * qb, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in NAMES if INVERSES[n].linear])
@LAW
@given(seed=st.integers(0, 1000), condition=st.floats(1.0, 100.0))
def test_linear_inverses_are_symmetric(name: str, seed: int, condition: float) -> None:
    inverse = INVERSES[name]()
    matrix, a = system(8, condition, seed)
    _, b = system(8, condition, seed + 1)
    state = inverse.init(Matrix(matrix))
    qa, qb = (flatten(inverse.solve(state, [v]).value) for v in (a, b))
    torch.testing.assert_close(a @ qb, b @ qa, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@LAW
@given(seed=st.integers(0, 1000), scale=st.sampled_from([-1000.0, -1.0, 1e-3, 7.0]))
def test_solve_scales_with_the_vector(name: str, seed: int, scale: float) -> None:
    inverse = INVERSES[name]()
    matrix, vector = system(8, 10.0, seed)
    once, scaled = solve(inverse, matrix, vector), solve(inverse, matrix, scale * vector)
    torch.testing.assert_close(scaled / scale, once, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gives_zero_and_claims_nothing_more(name: str) -> None:
    inverse = INVERSES[name]()
    matrix = 0.5 * torch.eye(4, dtype=torch.float64)
    result = inverse.solve(inverse.init(Matrix(matrix)), [torch.zeros(4, dtype=torch.float64)])
    assert not bool(flatten(result.value).any())
    assert result.status in (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)
    assert result.stats.relative_residual in (None, 0.0)
    assert (result.stats.largest_eigenvalue or 0.0) <= 0.5 * (1.0 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_hessian_of_zero_is_survived(name: str) -> None:
    inverse = INVERSES[name]()
    result = inverse.solve(
        inverse.init(Matrix(torch.zeros(4, 4, dtype=torch.float64))),
        [torch.ones(4, dtype=torch.float64)],
    )
    assert bool(torch.isfinite(flatten(result.value)).all())
    assert result.status is not SolveStatus.CONVERGED


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_reported(name: str, factor: float) -> None:
    inverse, operator = INVERSES[name](), Counted(factor)
    vector = randn_like(operator.like, 0)
    result = inverse.solve(inverse.init(operator), vector)
    if operator.products:
        assert result.status is SolveStatus.NONFINITE
    else:
        assert all(torch.equal(q, v) for q, v in zip(result.value, vector, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1000.0])
def test_reported_residual_and_eigenvalue_are_honest(name: str, condition: float) -> None:
    inverse = INVERSES[name]()
    matrix, vector = system(9, condition, seed=5)
    operator = Matrix(matrix)
    state = inverse.init(operator)
    result = inverse.solve(state, [vector])
    stats, solution = result.stats, flatten(result.value)
    residual = float((vector - state.operator.dense() @ solution).norm())
    if stats.residual_norm is not None:
        assert stats.relative_residual == pytest.approx(
            stats.residual_norm / float(vector.norm()), rel=1e-12
        )
        assert residual <= stats.residual_norm * (1.0 + 1e-9) + 1e-11
    if stats.largest_eigenvalue is not None:
        top = float(torch.linalg.eigvalsh(state.operator.dense())[-1])
        assert 0.0 < stats.largest_eigenvalue <= top * (1.0 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_products_spent_are_in_the_stats(name: str) -> None:
    inverse = INVERSES[name]()
    operator = Matrix(random_spd(9))
    result = inverse.solve(inverse.init(operator), [torch.ones(9, dtype=torch.float64)])
    assert result.stats.hvps == operator.products


@pytest.mark.parametrize(("inverse", "tolerance"), PRECISE, ids=PRECISE_NAMES)
@pytest.mark.parametrize(("size", "condition"), [(1, 1.0), (3, 5.0), (10, 50.0), (30, 30.0)])
def test_equals_the_dense_solution_of_random_systems(
    inverse: Inverse, tolerance: float, size: int, condition: float
) -> None:
    matrix, vector = system(size, condition, seed=size)
    truth = torch.linalg.solve(matrix, vector)
    error = float((solve(inverse, matrix, vector) - truth).norm() / truth.norm())
    assert error < tolerance


@pytest.mark.parametrize(("inverse", "tolerance"), PRECISE, ids=PRECISE_NAMES)
def test_equals_the_dense_solution_on_a_net_at_its_minimum(
    inverse: Inverse, tolerance: float
) -> None:
    operator, matrix = net_hessian()
    vector = randn_like(operator.like, 3)
    spectrum = torch.linalg.eigvalsh(matrix)
    assert 0.0 < float(spectrum[0]) < float(spectrum[-1])
    truth = torch.linalg.solve(matrix, flatten(vector))
    result = inverse.solve(inverse.init(operator), vector)
    assert float((flatten(result.value) - truth).norm() / truth.norm()) < tolerance
    assert result.status in (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)


def test_every_inverse_is_held_to_the_dense_solution() -> None:
    inexact = {Identity.name}
    assert set(PRECISE_NAMES) | inexact == set(INVERSES)


def net_hessian() -> tuple[Hessian, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = 2.0 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (12,), generator=generator)
    start = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 2), (3,), (3, 3))
    ]

    def loss(weights: list[Tensor]) -> Tensor:
        first, bias, second = weights
        logits = torch.tanh(inputs @ first.T + bias) @ second.T
        ridge = torch.stack([w.square().sum() for w in weights]).sum()
        return F.cross_entropy(logits, targets) + 0.03 * ridge

    weights = [w.requires_grad_() for w in minimise(loss, start)[0]]
    gradient = torch.autograd.grad(loss(weights), weights, create_graph=True)
    operator = Hessian(gradient, weights)
    return operator, operator.dense()


@pytest.mark.parametrize("name", NAMES)
def test_float32_vectors_stay_float32(name: str) -> None:
    inverse = INVERSES[name]()
    matrix, vector = system(9, 10.0, seed=1)
    double = solve(inverse, matrix, vector)
    single = solve(inverse, matrix.float(), vector.float())
    assert single.dtype == torch.float32
    close = torch.linalg.vector_norm(sub([single.double()], [double])[0])
    # The two dtypes draw different starts of the power iteration and sketches.
    assert float(close) < 0.05 * float(double.norm())
