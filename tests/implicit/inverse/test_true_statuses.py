"""Statuses against the dense answer: random systems of every kind, in every precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import ConjugateGradient, Dense, Hessian, Identity, Inverse, Neumann, Nystrom
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Matrix, largest_eigenvalue
from ift_tune.implicit.inverse import InverseResult
from ift_tune.implicit.preconditioner import DiagonalPreconditioner
from ift_tune.implicit.vectors import flatten, precision

SIZE = 12
SPECTRA = {
    "definite": lambda g: torch.logspace(-1.5, 0, SIZE, dtype=torch.float64),
    "ill-conditioned": lambda g: torch.logspace(-6, 0, SIZE, dtype=torch.float64),
    "singular": lambda g: torch.cat([torch.zeros(3), torch.rand(SIZE - 3, generator=g) + 0.1]),
    "indefinite": lambda g: torch.linspace(-0.4, 1.0, SIZE),
    "nearly symmetric": lambda g: torch.cat(
        [torch.tensor([-1.0, 1.0]), torch.rand(10, generator=g)]
    ),
    "symmetric": lambda g: torch.linspace(-1.0, 1.0, SIZE),
    "negative": lambda g: -torch.rand(SIZE, generator=g) - 0.1,
}
SCALES = (1.0, 1e-30, 1e20)
INVERSES: list[Inverse] = [
    Neumann(terms=5),
    Neumann(terms=60, alpha_scale=1.5),
    Neumann(terms=8, alpha=3.0),
    ConjugateGradient(max_steps=30),
    ConjugateGradient(max_steps=5, tolerance=1e-2),
    ConjugateGradient(max_steps=30, preconditioner=DiagonalPreconditioner(probes=1)),
    Nystrom(rank=4, damping=1e-6),
    Dense(),
    Identity(),
]
CASES = list(itertools.product(SPECTRA, (torch.float64, torch.float32), SCALES, range(8)))


def system(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix in float64, its eigenvalues, and a right-hand side of length about 1."""
    g = torch.Generator().manual_seed(seed)
    values = SPECTRA[name](g).double()
    size = 10.0 ** float(torch.randint(-3, 4, (1,), generator=g))  # α has a dimension
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(size * values) @ basis.T
    vector = torch.randn(SIZE, generator=g, dtype=torch.float64)
    return 0.5 * (matrix + matrix.T), size * values, vector


def judge(inverse: Inverse, result: InverseResult, matrix: Tensor, vector: Tensor) -> list[str]:
    """Return what a result says that the dense matrix contradicts."""
    values = torch.linalg.eigvalsh(matrix)
    largest = float(values.abs().max())
    eps = max(precision(result.value), 1e-16)
    rounding = 100.0 * SIZE * eps * largest
    found = flatten(result.value).double()
    residual = float((vector - matrix @ found).norm() / vector.norm())
    tolerance = float(getattr(inverse, "tolerance", 1e-3))
    reported = result.stats.relative_residual
    status, wrong = result.status, []
    # Rounding of the product itself, which no measurement in this precision can tell from 0.
    blur = 100.0 * eps * (1.0 + largest * float(found.norm() / vector.norm()))
    if status is SolveStatus.CONVERGED and residual > 2.0 * tolerance + blur:
        wrong.append(f"converged with a residual of {residual:.1e}")
    if status is SolveStatus.NEGATIVE_CURVATURE and float(values.min()) > rounding:
        wrong.append(f"negative curvature, λ_min = {float(values.min()):.1e}")
    if status is SolveStatus.SINGULAR and float(values.abs().min()) > 1e4 * rounding:
        wrong.append(f"singular, |λ|_min = {float(values.abs().min()):.1e}")
    if status is SolveStatus.DIVERGED:
        alpha = result.stats.alpha or 0.0
        if alpha * float(values.max()) < 2.0 - 1e-3 and alpha * float(values.min()) > -1e-3:
            wrong.append(
                f"diverged, α·λ in [{alpha * values.min():.2g}, {alpha * values.max():.2g}]"
            )
    if status is SolveStatus.NONFINITE and bool(found.isfinite().all()):
        wrong.append("nonfinite, and all is finite")
    if status is not SolveStatus.NONFINITE and not bool(found.isfinite().all()):
        wrong.append(f"{status.value}, and not finite")
    unsolved = (SolveStatus.DIVERGED, SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NONFINITE)
    if reported is not None and status not in unsolved and residual > 1.1 * reported + blur:
        wrong.append(f"residual {reported:.1e} reported, {residual:.1e} is true")
    return wrong


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
def test_every_status_is_true(inverse: Inverse) -> None:
    assert len(CASES) >= 300
    wrong = []
    for name, dtype, scale, seed in CASES:
        matrix, _, vector = system(name, seed)
        operator, right = Matrix(matrix.to(dtype)), (scale * vector).to(dtype)
        result = inverse.solve(inverse.init(operator), [right])
        rounded = operator.matrix.double()
        found = judge(inverse, result, rounded, right.double())
        wrong += [f"{name}, {dtype}, {scale:g}, {seed}: {text}" for text in found]
    assert wrong == []


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_automatic_alpha_stays_below_2(name: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        matrix, values, _ = system(name, seed)
        state = Neumann().init(Matrix(matrix.to(dtype)))
        assert Neumann().step_size(state) * float(values.abs().max()) < 2.0
        pair = largest_eigenvalue(Matrix(matrix.to(dtype)), steps=2, seed=seed)
        assert abs(pair.value) <= float(values.abs().max()) * (1.0 + 1e-5)
        if pair.value < 0.0:
            assert float(values.min()) < 0.0


def net_system(seed: int, low: bool) -> tuple[Hessian, Tensor, list[Tensor]]:
    """Return the products of a trained net, its true matrix, and a right-hand side."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs, targets = torch.randn(30, 3), torch.randint(2, (30,))
    weights = list(net.parameters())

    def gradient(low: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = F.cross_entropy(net(inputs), targets)
        decay = 1e-2 * torch.stack([w.square().sum() for w in weights]).sum()
        return list(torch.autograd.grad(loss + decay, weights, create_graph=True))

    optimizer = torch.optim.Adam(weights, lr=0.05)
    for _ in range(30 * (seed % 3)):  # far from a minimum, nearer, near
        for w, g in zip(weights, gradient(False), strict=True):
            w.grad = g.detach()
        optimizer.step()
    vector = [torch.randn(w.shape) for w in weights]
    return Hessian(gradient(low), weights), Hessian(gradient(False), weights).dense(), vector


@pytest.mark.parametrize("inverse", INVERSES, ids=str)
def test_a_solve_in_bfloat16_is_not_called_converged_by_its_recurrence(inverse: Inverse) -> None:
    noise = 2.0**-8  # what bfloat16 leaves of a number
    for seed in range(6):
        for low in (False, True):
            operator, truth, vector = net_system(seed, low)
            result = inverse.solve(inverse.init(operator), vector)
            flat, found = flatten(vector), flatten(result.value)
            residual = float((flat - truth @ found).norm() / flat.norm())
            tolerance = float(getattr(inverse, "tolerance", 1e-3))
            # The products themselves are off by this: nothing measured by them can be nearer.
            size = float(truth.abs().max() * found.norm() / flat.norm())
            blur = (20.0 * noise if low else 1e-4) * size
            if result.status is SolveStatus.CONVERGED:
                assert residual <= 2.0 * tolerance + blur
                reported = result.stats.relative_residual
                assert reported is not None
                assert reported <= 2.0 * tolerance


def test_conjugate_gradient_in_bfloat16_says_what_it_has_reached() -> None:
    inverse = ConjugateGradient(max_steps=200, damping=1e-3)
    statuses = []
    for seed in (2, 5):
        operator, truth, vector = net_system(seed, low=True)
        result = inverse.solve(inverse.init(operator), vector)
        flat, found = flatten(vector), flatten(result.value)
        true = float((flat - truth @ found - 1e-3 * found).norm() / flat.norm())
        statuses.append(result.status)
        assert result.stats.relative_residual is not None
        assert true < 20.0 * result.stats.relative_residual
    assert SolveStatus.CONVERGED not in statuses


def test_a_vanishing_right_hand_side_is_solved_and_not_waved_through() -> None:
    matrix, _, vector = system("definite", 0)
    inverse = ConjugateGradient(max_steps=50)
    for scale in (1e-36, 1e-30, 1e30):
        right = (scale * vector).float()
        result = inverse.solve(inverse.init(Matrix(matrix.float())), [right])
        truth = torch.linalg.solve(matrix, right.double())
        assert float((result.value[0].double() - truth).norm() / truth.norm()) < 1e-3
        assert result.status is SolveStatus.CONVERGED
        assert math.isfinite(result.stats.residual_norm or math.nan)


def test_a_singular_system_stops_before_its_solution_is_noise() -> None:
    for seed in range(10):
        for dtype in (torch.float32, torch.float64):
            matrix, values, vector = system("singular", seed)
            inverse = ConjugateGradient(max_steps=200, tolerance=1e-9)
            result = inverse.solve(inverse.init(Matrix(matrix.to(dtype))), [vector.to(dtype)])
            assert result.status is SolveStatus.SINGULAR
            # 1/λ of the smallest that is none of the zeros: no more can be asked for.
            smallest = float(values[values > 0].min())
            assert float(result.value[0].norm()) < 2.0 * float(vector.norm()) / smallest
            assert "damping" in result.status.advice
