"""Curvature operators against dense Hessians, and eigenvalue estimates against `eigvalsh`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import DoubleBackwardError, UsageError
from ift_tune.hyper import WeightDecay
from ift_tune.implicit.curvature import (
    Damped,
    Eigenpair,
    GaussNewton,
    Hessian,
    Matrix,
    Operator,
    damped,
    largest_eigenvalue,
    ritz_interval,
)
from ift_tune.implicit.double_backward import Kernels, safe_kernels, vjp
from ift_tune.implicit.vectors import flatten, randn_like, unflatten
from ift_tune.testing import random_spd

SHAPES = [(4, 3), (4,), (2, 4)]
SIZE = 24
LAW = settings(derandomize=True, deadline=None, max_examples=25)


class Net:
    """A net of 24 weights as functions of one flat vector, and its data."""

    def __init__(self, loss: str = "cross_entropy") -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(2, (7,), generator=generator)
        self.flat = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.loss_name = loss
        like = [torch.empty(shape, dtype=torch.float64) for shape in SHAPES]
        self.weights = [w.clone().requires_grad_() for w in unflatten(self.flat, like)]

    def outputs(self, weights: list[Tensor]) -> Tensor:
        first, bias, second = weights
        return torch.tanh(self.inputs @ first.T + bias) @ second.T

    def loss_of(self, outputs: Tensor) -> Tensor:
        if self.loss_name == "squares":
            return 0.5 * (outputs - self.inputs[:, :2]).square().sum()
        return F.cross_entropy(outputs, self.targets)

    def flat_loss(self, flat: Tensor) -> Tensor:
        return self.loss_of(self.outputs(unflatten(flat, self.weights)))

    def hessian(self) -> Hessian:
        loss = self.loss_of(self.outputs(self.weights))
        return Hessian(torch.autograd.grad(loss, self.weights, create_graph=True), self.weights)

    def dense_hessian(self) -> Tensor:
        return hessian_of(self.flat_loss, self.flat)

    def dense_gauss_newton(self) -> Tensor:
        outputs = self.outputs(unflatten(self.flat, self.weights)).detach()

        def flat_outputs(flat: Tensor) -> Tensor:
            return self.outputs(unflatten(flat, self.weights)).reshape(-1)

        def loss_of_flat(flat: Tensor) -> Tensor:
            return self.loss_of(flat.view_as(outputs))

        jacobian = jacobian_of(flat_outputs, self.flat)
        inner = hessian_of(loss_of_flat, outputs.reshape(-1))
        return jacobian.T @ inner @ jacobian


def hessian_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.hessian(function, at)  # type: ignore[no-untyped-call]
    return found


def jacobian_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(function, at)  # type: ignore[no-untyped-call]
    return found


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", ["cross_entropy", "squares"])
def test_hessian_is_that_of_torch(loss: str) -> None:
    net = Net(loss)
    close(net.hessian().dense(), net.dense_hessian())


@pytest.mark.parametrize("loss", ["cross_entropy", "squares"])
def test_gauss_newton_is_jacobian_hessian_jacobian(loss: str) -> None:
    net = Net(loss)
    outputs = net.outputs(net.weights)
    found = GaussNewton(net.loss_of(outputs), outputs, net.weights).dense()
    close(found, net.dense_gauss_newton())
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    assert not torch.allclose(found, net.dense_hessian(), atol=1e-3)


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (9,), generator=generator)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = inputs @ weight.T
    loss = F.cross_entropy(outputs, targets)
    hessian = Hessian(torch.autograd.grad(loss, [weight], create_graph=True), [weight])
    close(GaussNewton(loss, outputs, [weight]).dense(), hessian.dense())


def test_gauss_newton_refuses_outputs_the_loss_is_not_computed_from() -> None:
    net = Net()
    stray = net.outputs(net.weights)
    with pytest.raises(UsageError, match="does not depend on outputs"):
        GaussNewton(net.loss_of(net.outputs(net.weights)), stray, net.weights)


def test_gauss_newton_has_zero_rows_for_weights_the_outputs_do_not_see() -> None:
    net = Net("squares")
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    outputs = net.outputs(net.weights)
    loss = net.loss_of(outputs) + idle.square().sum()
    found = GaussNewton(loss, outputs, [*net.weights, idle]).dense()
    close(found[:SIZE, :SIZE], net.dense_gauss_newton())
    assert not bool(found[SIZE:].any())
    assert not bool(found[:, SIZE:].any())


def test_gauss_newton_of_a_loss_linear_in_the_outputs_is_zero() -> None:
    net = Net()
    outputs = net.outputs(net.weights)
    found = GaussNewton(outputs.sum(), outputs, net.weights).dense()
    assert not bool(found.any())


def test_penalty_adds_its_curvature() -> None:
    net = Net()
    module = torch.nn.ParameterList(net.weights)
    decay = WeightDecay(module, "tensor", init=0.3, transform="exp")
    parameters: list[Tensor] = list(module.parameters())
    outputs = net.outputs(parameters)
    loss = net.loss_of(outputs)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    shift = 0.6 * torch.eye(SIZE, dtype=torch.float64)
    penalty = decay.penalty()
    close(Hessian(gradient, parameters, penalty).dense(), net.dense_hessian() + shift)
    found = GaussNewton(loss, outputs, parameters, penalty).dense()
    close(found, net.dense_gauss_newton() + shift)


def test_hessian_of_a_loss_linear_in_some_weights_and_blind_to_others() -> None:
    curved, linear, idle = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in "abc")
    loss = curved.pow(3).sum() + 2.0 * linear.sum()
    weights = [curved, linear, idle]
    gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    truth = torch.diag(torch.tensor([6.0, 6.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    close(Hessian(gradient, weights).dense(), truth)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_damping_adds_to_the_diagonal_and_counts_products_inside(damping: float) -> None:
    inner = Matrix(random_spd(5))
    operator = damped(inner, damping)
    assert isinstance(operator, Damped) == (damping > 0.0)
    operator.matvec([torch.ones(5, dtype=torch.float64)])
    assert (operator.products, inner.products) == (1, 1)
    close(operator.dense(), random_spd(5) + damping * torch.eye(5, dtype=torch.float64))


def test_matrix_keeps_the_shapes_it_was_given() -> None:
    like = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    operator = Matrix(random_spd(5), like)
    vector = randn_like(like, 0)
    product = operator.matvec(vector)
    assert [p.shape for p in product] == [x.shape for x in like]
    close(flatten(product), random_spd(5) @ flatten(vector))
    close(Operator.dense(operator), random_spd(5))


@pytest.mark.parametrize("shape", [(3, 3), (4, 3)])
def test_matrix_of_the_wrong_size_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="4 weights must be square"):
        Matrix(torch.zeros(shape), [torch.zeros(4)])


def test_products_neither_write_gradients_nor_free_the_graph() -> None:
    net = Net()
    loss = net.loss_of(net.outputs(net.weights))
    operator = Hessian(torch.autograd.grad(loss, net.weights, create_graph=True), net.weights)
    vector = randn_like(net.weights, 0)
    before = flatten(vector).clone()
    first, again = flatten(operator.matvec(vector)), flatten(operator.matvec(vector))
    assert torch.equal(first, again)
    assert torch.equal(flatten(vector), before)
    assert not first.requires_grad
    assert all(w.grad is None for w in net.weights)
    assert operator.products == 2


@LAW
@given(seed=st.integers(0, 1000), scale=st.floats(-5.0, 5.0))
def test_hessian_products_are_linear_and_symmetric(seed: int, scale: float) -> None:
    operator = Net().hessian()
    a, b = randn_like(operator.like, seed), randn_like(operator.like, seed + 1)
    ha, hb = flatten(operator.matvec(a)), flatten(operator.matvec(b))
    mixed = [x + scale * y for x, y in zip(a, b, strict=True)]
    close(flatten(operator.matvec(mixed)), ha + scale * hb)
    close(flatten(b) @ ha, flatten(a) @ hb)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1, 5, 20])
def test_power_iteration_finds_the_eigenvalue_of_largest_magnitude(size: int, sign: float) -> None:
    matrix = sign * random_spd(size, condition=100.0, seed=size)
    pair = largest_eigenvalue(Matrix(matrix), steps=300)
    truth = sign * float(torch.linalg.eigvalsh(sign * matrix)[-1])
    assert pair.value == pytest.approx(truth, abs=1e-9)
    vector = flatten(pair.vector)
    close(vector.norm(), torch.tensor(1.0, dtype=torch.float64))
    close(matrix @ vector, truth * vector, tolerance=1e-4)


@LAW
@given(size=st.integers(2, 15), seed=st.integers(0, 1000), steps=st.integers(1, 20))
def test_power_iteration_rises_from_below_on_spd(size: int, seed: int, steps: int) -> None:
    matrix = random_spd(size, condition=50.0, seed=seed)
    values = [largest_eigenvalue(Matrix(matrix), steps=k).value for k in (steps, steps + 1)]
    assert 0.0 < values[0] <= values[1] * (1.0 + 1e-12)
    assert values[1] <= float(torch.linalg.eigvalsh(matrix)[-1]) * (1.0 + 1e-12)


def test_power_iteration_spends_its_steps_and_goes_on_from_an_earlier_pair() -> None:
    matrix = random_spd(20, condition=50.0)
    operator = Matrix(matrix)
    first = largest_eigenvalue(operator, steps=5)
    assert operator.products == 5
    continued = largest_eigenvalue(Matrix(matrix), steps=5, start=first)
    assert continued.value == pytest.approx(
        largest_eigenvalue(Matrix(matrix), steps=10).value, rel=1e-12
    )
    values, vectors = torch.linalg.eigh(matrix)
    exact = Eigenpair(float(values[-1]), [vectors[:, -1]])
    warm = largest_eigenvalue(Matrix(1.01 * matrix), steps=1, start=exact)
    assert warm.value == pytest.approx(1.01 * float(values[-1]), rel=1e-12)


SPECTRA = {
    "definite": [10.0 ** (-4.0 * i / 39) for i in range(40)],
    "as far below 0 as above": [-0.95 + 1.95 * i / 39 for i in range(40)],
    "one far below 0": [-1.0, *(-0.3 + 0.8 * i / 38 for i in range(39))],
    "of rank two": [1.0, -0.5, *[0.0] * 38],
}


@pytest.mark.parametrize("turned", [True, False], ids=["dense", "diagonal"])
@pytest.mark.parametrize("name", SPECTRA)
def test_where_power_iteration_begins_is_as_good_as_a_normal_vector(
    name: str, turned: bool
) -> None:
    values = torch.tensor(SPECTRA[name], dtype=torch.float64)
    found: dict[str, list[float]] = {"own": [], "normal": []}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(40, 40, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(drawn).Q if turned else torch.eye(40, dtype=torch.float64)
        operator = Matrix((basis * values) @ basis.T)
        normal = Eigenpair(1.0, randn_like(operator.like, seed))
        for start, begun in (("own", None), ("normal", normal)):
            pair = largest_eigenvalue(operator, steps=12, seed=seed, start=begun)
            found[start].append(abs(pair.value))
    least, middle = min(found["own"]), sorted(found["own"])[10]
    assert middle >= sorted(found["normal"])[10] - 0.05
    assert least >= 0.8 * min(found["normal"])
    assert max(found["own"]) <= 1.0 + 1e-12


@pytest.mark.parametrize("size", [1, 2, 3])
def test_power_iteration_of_few_weights_misses_no_direction(size: int) -> None:
    """A vector of ±1 would be orthogonal to (1, −1) every other time."""
    matrix = torch.full((size, size), -0.1, dtype=torch.float64)
    matrix += 1.1 * torch.eye(size, dtype=torch.float64)
    truth = float(torch.linalg.eigvalsh(matrix)[-1])
    for seed in range(30):
        pair = largest_eigenvalue(Matrix(matrix), steps=60, seed=seed)
        assert pair.value == pytest.approx(truth, rel=1e-3)


def test_power_iteration_of_zero_is_zero() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert largest_eigenvalue(Matrix(zero), steps=4).value == 0.0


@LAW
@given(
    values=st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    dimension=st.integers(1, 6),
)
def test_ritz_values_lie_inside_the_spectrum(
    values: list[float], seed: int, dimension: int
) -> None:
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    vector = torch.randn(
        len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    moments = [float((vector.square() * eigenvalues**j).sum()) for j in range(2 * dimension)]
    low, high = ritz_interval(moments, torch.finfo(torch.float64).eps)
    slack = 1e-6 * max(1.0, float(eigenvalues.abs().max()))
    assert low <= high
    assert low >= min(values) - slack
    assert high <= max(values) + slack


def test_ritz_values_of_a_whole_krylov_space_are_the_eigenvalues() -> None:
    eigenvalues = torch.tensor([-1.5, 0.2, 0.9], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    moments = [float((weights * eigenvalues**j).sum()) for j in range(6)]
    low, high = ritz_interval(moments, torch.finfo(torch.float64).eps)
    assert (low, high) == pytest.approx((-1.5, 0.9), abs=1e-7)


def _attention(weight: Tensor) -> Tensor:
    heads = weight.reshape(1, 1, 4, 8)
    return F.scaled_dot_product_attention(heads, heads, heads).square().sum()


def _ctc(weight: Tensor) -> Tensor:
    scores = weight.reshape(8, 1, 4).log_softmax(dim=-1)
    return F.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))


@pytest.mark.parametrize(
    ("loss", "operation", "mend"),
    [
        (_attention, "attention", r"safe_kernels\(\)"),
        (_ctc, "_ctc_loss_backward", "second derivative"),
    ],
)
def test_operations_without_second_derivative_are_named(
    loss: Callable[[Tensor], Tensor], operation: str, mend: str
) -> None:
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = torch.autograd.grad(loss(weight), [weight], create_graph=True)
    with pytest.raises(DoubleBackwardError, match=operation) as caught:
        Hessian(gradient, [weight]).matvec([torch.ones(32)])
    caught.match(mend)


def test_safe_kernels_make_attention_twice_differentiable() -> None:
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight.requires_grad_()
    with safe_kernels():
        truth = hessian_of(_attention, weight.detach())
        gradient = torch.autograd.grad(_attention(weight), [weight], create_graph=True)
    close(Hessian(gradient, [weight]).dense(), truth)


def test_other_errors_of_autograd_are_left_alone() -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="shape") as caught:
        vjp([weight.square()], [weight], [torch.ones(3)])
    assert not isinstance(caught.value, DoubleBackwardError)


def test_estimates_meet_a_real_spectrum() -> None:
    net = Net()
    spectrum = torch.linalg.eigvalsh(net.dense_hessian())
    extreme = max(float(spectrum[-1]), -float(spectrum[0]))
    found = largest_eigenvalue(net.hessian(), steps=200).value
    assert math.isclose(abs(found), extreme, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("model", "cudnn"), [(None, False), (nn.Conv1d(1, 1, 1), True), (nn.GRU(1, 1), False)]
)
def test_safe_kernels_come_and_go_even_after_an_error(model: nn.Module | None, cudnn: bool) -> None:
    before = Kernels.in_force()
    assert sum(before.attention) > 1
    with safe_kernels(model):
        assert Kernels.in_force() == ((True, False, False, False), cudnn)
        with safe_kernels(nn.Linear(1, 1)):  # inside, what is off stays off
            assert Kernels.in_force().cudnn == cudnn
    assert Kernels.in_force() == before
    with pytest.raises(ZeroDivisionError), safe_kernels(model):
        raise ZeroDivisionError
    assert Kernels.in_force() == before
