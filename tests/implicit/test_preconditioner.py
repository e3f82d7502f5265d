"""Preconditioned series and conjugate gradient against dense M and H, and the diagonal M itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ift_tune import ClassificationProblem, MetaConfig, UsageError, WeightDecay
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import (
    Damped,
    GaussNewton,
    Hessian,
    Matrix,
    Operator,
    dual_norm,
    largest_eigenvalue,
)
from ift_tune.implicit.inverse import ConjugateGradient, Inverse, Neumann
from ift_tune.implicit.preconditioner import (
    PRECONDITIONERS,
    DiagonalPreconditioner,
    NoPreconditioner,
    Preconditioner,
)
from ift_tune.implicit.vectors import Tensors, flatten, randn_like, unflatten
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import Splits
from ift_tune.testing import random_spd
from ift_tune.testing.contracts import check_inverse

LAW = settings(derandomize=True, deadline=None, max_examples=20)
SIZE = 11
EXAMPLES = [example for kind in PRECONDITIONERS.values() for example in kind.examples()]


class Split(Operator):
    """A matrix, part of it known in closed form."""

    def __init__(self, data: Tensor, known: Tensor) -> None:
        super().__init__([torch.zeros(s, dtype=torch.float64) for s in ((3, 2), (), (1, 2, 2))])
        self.data, self.known = data, known

    def _product(self, vector: Tensors) -> list[Tensor]:
        return unflatten((self.data + self.known) @ flatten(vector), self.like)

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        return unflatten(self.known @ flatten(vector), self.like)


def decayed(seed: int = 0, spread: float = 2.0) -> Split:
    """Return a matrix of data curvature and decays that differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    strengths = 10.0 ** (
        spread * (torch.rand(SIZE, generator=generator, dtype=torch.float64) - 1.0)
    )
    return Split(0.1 * random_spd(SIZE, condition=30.0, seed=seed), torch.diag(strengths))


def right_side(seed: int = 0) -> Tensor:
    return flatten(randn_like(decayed().like, seed))


def dense_inverse(preconditioner: Preconditioner, operator: Operator) -> Tensor:
    """Return M⁻¹, shape (P, P)."""
    apply = preconditioner.near(operator)
    columns = [flatten(apply(unflatten(e, operator.like))) for e in torch.eye(SIZE).double()]
    return torch.stack(columns, 1)


def spectrum(inverse_of_m: Tensor, matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvals(inverse_of_m @ matrix).real.sort().values
    return values


@pytest.mark.parametrize("preconditioner", EXAMPLES, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_every_m_is_symmetric_positive_definite_and_counts_its_products(
    preconditioner: Preconditioner, seed: int
) -> None:
    operator = decayed(seed)
    inverse_of_m = dense_inverse(preconditioner, operator)
    torch.testing.assert_close(inverse_of_m, inverse_of_m.T)
    assert float(torch.linalg.eigvalsh(inverse_of_m)[0]) > 0.0
    assert operator.products == preconditioner.max_hvps()
    vector = randn_like(operator.like, 1)
    before = [v.clone() for v in vector]
    preconditioner.near(operator)(vector)
    assert all(torch.equal(v, b) for v, b in zip(vector, before, strict=True))


@pytest.mark.parametrize("preconditioner", EXAMPLES, ids=repr)
@pytest.mark.parametrize("inverse", [Neumann(terms=3), ConjugateGradient(damping=0.1)], ids=str)
def test_the_laws_of_inverses_hold_with_every_m(
    inverse: Neumann | ConjugateGradient, preconditioner: Preconditioner
) -> None:
    check_inverse(replace(inverse, preconditioner=preconditioner))


@LAW
@given(
    terms=st.integers(0, 12),
    scale=st.floats(0.05, 1.9),
    probes=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_neumann_is_the_series_in_m_inverse_h(
    terms: int, scale: float, probes: int, seed: int
) -> None:
    operator, vector = decayed(seed), right_side(seed)
    matrix, preconditioner = operator.dense(), DiagonalPreconditioner(probes)
    inverse_of_m = dense_inverse(preconditioner, operator)
    alpha = scale / float(spectrum(inverse_of_m, matrix)[-1])
    step = torch.eye(SIZE).double() - alpha * inverse_of_m @ matrix
    powers = [torch.linalg.matrix_power(step, j) for j in range(terms + 1)]
    truth = alpha * torch.stack(powers).sum(0) @ inverse_of_m @ vector
    inverse = Neumann(terms=terms, alpha=alpha, preconditioner=preconditioner)
    result = inverse.solve(inverse.init(operator), unflatten(vector, operator.like))
    torch.testing.assert_close(flatten(result.value), truth, rtol=1e-10, atol=1e-12)
    assert result.status in (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)


@LAW
@given(steps=st.integers(1, 8), damping=st.sampled_from([0.0, 0.2]), seed=st.integers(0, 100))
def test_pcg_is_cg_on_the_matrix_scaled_from_both_sides(
    steps: int, damping: float, seed: int
) -> None:
    operator, vector = decayed(seed), right_side(seed)
    preconditioner = DiagonalPreconditioner(1)
    inverse = ConjugateGradient(steps, 1e-14, damping, preconditioner)
    found = inverse.solve(inverse.init(operator), unflatten(vector, operator.like))
    damped = Damped(operator, damping)
    root = dense_inverse(preconditioner, damped).diag().sqrt()
    # With S = M^(−1/2): CG on S(H + δI)S·u = Sv, and q = Su.
    plain = ConjugateGradient(steps, 1e-14)
    state = plain.init(Matrix(root[:, None] * damped.dense() * root))
    scaled = plain.solve(state, [root * vector])
    torch.testing.assert_close(flatten(found.value), root * scaled.value[0], rtol=1e-6, atol=1e-9)
    assert found.status is scaled.status
    for name in ("residual_norm", "relative_residual", "largest_eigenvalue"):
        mine, theirs = getattr(found.stats, name), getattr(scaled.stats, name)
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("probes", [0, 1, 4])
def test_power_iteration_finds_the_largest_eigenvalue_of_m_inverse_h(probes: int) -> None:
    operator = decayed(3)
    preconditioner = DiagonalPreconditioner(probes)
    apply = preconditioner.near(operator)
    truth = float(spectrum(dense_inverse(preconditioner, operator), operator.dense())[-1])
    values = [largest_eigenvalue(operator, steps=k, precondition=apply).value for k in (2, 12, 300)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(truth, rel=1e-9)
    pair = largest_eigenvalue(operator, steps=300, precondition=apply)
    assert dual_norm(pair.vector, apply(pair.vector)) == pytest.approx(1.0)
    warm = largest_eigenvalue(operator, steps=1, start=pair, precondition=apply)
    assert warm.value == pytest.approx(truth, rel=1e-9)


def test_statuses_are_those_of_the_preconditioned_matrix() -> None:
    """α = 1.5/λ_max(H) suits H, and is far too large for M⁻¹H, whose λ_max is larger here."""
    operator, preconditioner = decayed(1), DiagonalPreconditioner()
    vector = unflatten(right_side(), operator.like)
    matrix = operator.dense()
    alpha = 1.5 / float(torch.linalg.eigvalsh(matrix)[-1])
    largest = float(spectrum(dense_inverse(preconditioner, operator), matrix)[-1])
    assert alpha * largest > 2.0
    for inverse, status in (
        (Neumann(terms=40, alpha=alpha), SolveStatus.TRUNCATED),
        (Neumann(terms=40, alpha=alpha, preconditioner=preconditioner), SolveStatus.DIVERGED),
        (Neumann(terms=400, preconditioner=preconditioner), SolveStatus.CONVERGED),
    ):
        assert inverse.solve(inverse.init(operator), vector).status is status


@pytest.mark.parametrize("inverse", [Neumann(terms=20), ConjugateGradient(max_steps=20)])
def test_negative_curvature_is_seen_through_m(inverse: Neumann | ConjugateGradient) -> None:
    operator = decayed(2)
    operator.data = operator.data - 0.3 * torch.eye(SIZE).double()
    assert float(torch.linalg.eigvalsh(operator.dense())[0]) < 0.0
    inverse = replace(inverse, preconditioner=DiagonalPreconditioner(1))
    result = inverse.solve(inverse.init(operator), unflatten(right_side(), operator.like))
    assert result.status is SolveStatus.NEGATIVE_CURVATURE


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("probes", [0, 1])
def test_it_is_worth_more_than_its_probe_where_decays_differ(seed: int, probes: int) -> None:
    """At equal products, probe and power iteration paid, the answer is nearer."""
    operator, vector = decayed(seed, spread=3.0), right_side(seed)
    operator.data = 0.03 * operator.data
    truth = torch.linalg.solve(operator.dense(), vector)

    def error(inverse: Inverse) -> float:
        result = inverse.solve(inverse.init(operator), unflatten(vector, operator.like))
        return float((flatten(result.value) - truth).norm() / truth.norm())

    m = DiagonalPreconditioner(probes)
    assert error(Neumann(8 - probes, preconditioner=m)) < 0.5 * error(Neumann(8))
    preconditioned = ConjugateGradient(5 - probes, 1e-14, 0.0, m)
    assert error(preconditioned) < 0.5 * error(ConjugateGradient(5, 1e-14))


# The diagonal


def test_without_probes_it_is_the_diagonal_of_the_penalty() -> None:
    operator = decayed(4)
    found = flatten(DiagonalPreconditioner().init(operator))
    torch.testing.assert_close(found, operator.known.diag())
    assert operator.products == 0


def test_a_probe_adds_the_mean_curvature_of_the_data_by_tensor() -> None:
    operator = decayed(5)
    operator.data = torch.diag(torch.linspace(0.1, 1.1, SIZE, dtype=torch.float64))
    # z ⊙ Dz is the diagonal of a D that is diagonal, so one probe is exact.
    found = DiagonalPreconditioner(1).init(operator)
    parts = zip(
        unflatten(operator.data.diag(), operator.like),
        unflatten(operator.known.diag(), operator.like),
        strict=True,
    )
    truth = [known + data.mean() for data, known in parts]
    torch.testing.assert_close(flatten(found), flatten(truth))


def test_many_probes_tend_to_the_trace_of_each_tensor() -> None:
    operator = decayed(6)
    found = flatten(DiagonalPreconditioner(4000).init(operator)) - operator.known.diag()
    truth = [
        torch.full_like(d, float(d.mean())) for d in unflatten(operator.data.diag(), operator.like)
    ]
    torch.testing.assert_close(found, flatten(truth), rtol=0.1, atol=0.0)


def test_a_penalty_that_couples_weights_is_estimated_for_free() -> None:
    operator = decayed(7)
    operator.known = operator.known + 0.1 * random_spd(SIZE, seed=8)
    found = flatten(DiagonalPreconditioner().init(operator))
    assert operator.products == 0
    assert float(found.min()) > 0.0
    assert not torch.allclose(found, operator.known.diag())
    assert float((found - operator.known.diag()).norm()) < float(operator.known.diag().norm())


def test_what_no_curvature_is_known_of_is_not_blown_up() -> None:
    operator = decayed()
    operator.known = torch.diag((torch.arange(SIZE) < 4).double())
    found = flatten(DiagonalPreconditioner().init(operator))
    assert set(found.tolist()) == {1e-4, 1.0}
    operator.known = torch.zeros_like(operator.known)
    assert set(flatten(DiagonalPreconditioner().init(operator)).tolist()) == {1.0}


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_the_penalty_of_a_problem_is_its_known_part(kind: str) -> None:
    problem = small_problem()
    inputs, targets = next(iter(problem.splits.train))[:2]
    outputs = problem.model(inputs)
    loss = nn.functional.cross_entropy(outputs, targets)
    weights, penalty = problem.weights(), problem.penalty()
    operator: Operator = GaussNewton(loss, outputs, weights, penalty)
    if kind == "hessian":
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        operator = Hessian(gradient, weights, penalty)
    assert isinstance(problem.hyper, WeightDecay)
    strengths = flatten([2.0 * d for d in problem.hyper.decays()]).detach()
    vector = randn_like(weights, 0)
    known = flatten(operator.penalty_matvec(vector))
    torch.testing.assert_close(known, strengths * flatten(vector))
    twice = flatten(Damped(operator, 0.5).penalty_matvec(vector))
    torch.testing.assert_close(twice, (strengths + 0.5) * flatten(vector))
    assert operator.products == 0


# In a trial


def small_problem() -> ClassificationProblem:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    targets = (inputs[:, 0] + inputs[:, 1] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    batch = Batches(inputs, targets)
    hyper = WeightDecay(model, "weight", init=lambda raw: raw.uniform_(-6.0, -1.0))
    return ClassificationProblem(model, hyper, Splits(batch, batch, batch, batch))


@pytest.mark.parametrize(
    ("inverse", "first", "later"),
    [
        (Neumann(terms=3, preconditioner=DiagonalPreconditioner(1)), 16, 6),  # H is indefinite here
        (Neumann(terms=2, preconditioner=DiagonalPreconditioner(1)), 15, 5),
        (Neumann(terms=3, alpha=0.1, preconditioner=DiagonalPreconditioner()), 3, 3),
        (ConjugateGradient(3, 1e-14, 1.0, DiagonalPreconditioner(2)), 6, 6),
    ],
    ids=str,
)
def test_a_trial_pays_for_it_and_goes_on_to_the_bit(
    inverse: Inverse, first: int, later: int
) -> None:
    config = MetaConfig(inverse=inverse, inner_steps=2, inner_lr=0.01)
    through = JointOptimizer(small_problem(), config)
    spent = [through.step()["hvps"] for _ in range(4)]
    assert spent == [first, first + later, first + 2 * later, first + 3 * later]
    begun, resumed = (JointOptimizer(small_problem(), config) for _ in range(2))
    begun.step()
    begun.step()
    resumed.load_state_dict(begun.state_dict())
    resumed.step()
    resumed.step()
    for mine, theirs in zip(resumed.problem.hypers(), through.problem.hypers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", [Neumann, ConjugateGradient])
@pytest.mark.parametrize("value", [None, "diagonal", DiagonalPreconditioner])
def test_what_is_no_preconditioner_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(UsageError, match="preconditioner must be an object such as Diagonal"):
        kind(preconditioner=value)


@pytest.mark.parametrize("probes", [-1, 1.5, True])
def test_a_bad_number_of_probes_is_refused(probes: Any) -> None:
    with pytest.raises(UsageError, match="probes must be an integer of at least 0"):
        DiagonalPreconditioner(probes)


def test_none_is_the_default_and_gives_the_very_vector() -> None:
    assert Neumann().preconditioner == ConjugateGradient().preconditioner == NoPreconditioner()
    vector = randn_like(decayed().like, 0)
    assert NoPreconditioner().near(decayed())(vector) is vector
