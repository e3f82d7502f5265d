"""The hypergradient against closed forms and finite differences of the re-solved problem."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ift_tune.base.errors import DoubleBackwardError, UnreachableHyperparameterError, UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.hyper import ExampleWeights, WeightDecay
from ift_tune.implicit.curvature import Eigenpair, Hessian
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import Hypergradient, WarmStart, hypergradient
from ift_tune.implicit.inverse import (
    INVERSES,
    ConjugateGradient,
    Dense,
    Identity,
    Inverse,
    Neumann,
    Nystrom,
)
from ift_tune.implicit.vectors import flatten, unflatten
from ift_tune.testing import Quadratic
from ift_tune.testing.frozen import minimise

EXAMPLES = 10
SETUPS = ["decay", "examples"]
VAL_LOSSES = ["plain", "sees λ"]


class Setup:
    """A tanh net of 18 weights in float64, and a training loss with many λ."""

    def __init__(self, kind: str, val: str = "plain") -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.train_data = 2.0 * normal(EXAMPLES, 2), torch.arange(EXAMPLES) % 3
        self.val_data = 2.0 * normal(8, 2), torch.arange(8) % 3
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(normal(*parameter.shape))
        self.sees_hypers = val == "sees λ"
        self.examples = (
            ExampleWeights(EXAMPLES, like=self.train_data[0]) if (kind == "examples") else None
        )
        self.decay = WeightDecay(self.net, "weight", init=0.05) if kind == "decay" else None
        self.hyper: nn.Module = self.examples or self.decay or nn.Module()
        with torch.no_grad():
            for raw in self.hyper.parameters():
                raw.add_(0.5 * normal(*raw.shape))

    def logits(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        first, bias, second = weights
        return torch.tanh(inputs @ first.T + bias) @ second.T

    def train_of(self, weights: list[Tensor]) -> Tensor:
        """The training loss at `weights`, with the decay through autograd."""
        inputs, targets = self.train_data
        losses = F.cross_entropy(self.logits(weights, inputs), targets, reduction="none")
        if self.examples is not None:
            losses = self.examples.weigh(losses, torch.arange(EXAMPLES))
        loss = losses.mean()
        if self.decay is not None:
            return loss + self.decay.penalty().value(weights)
        return loss + 0.03 * torch.stack([w.square().sum() for w in weights]).sum()

    def val_of(self, weights: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self.logits(weights, self.val_data[0]), self.val_data[1])
        if self.sees_hypers:
            return loss + 0.1 * flatten([h.sin() for h in self.hyper.parameters()]).sum()
        return loss

    def weights(self) -> list[Tensor]:
        return list(self.net.parameters())

    def hypers(self) -> list[Tensor]:
        return list(self.hyper.parameters())

    def settle(self, solved: list[Tensor]) -> None:
        """Move the net to given weights."""
        with torch.no_grad():
            for parameter, value in zip(self.weights(), solved, strict=True):
                parameter.copy_(value)

    def val_at_minimum(self) -> float:
        """L_V(w*(λ), λ), by Newton's method from the net's weights, which are near w*."""
        like = self.weights()

        def loss(flat: Tensor) -> Tensor:
            return self.train_of(unflatten(flat, like))

        flat = flatten(like).detach().requires_grad_()
        for _ in range(3):
            (slope,) = torch.autograd.grad(loss(flat), flat)
            matrix = torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]
            flat = (flat - torch.linalg.solve(matrix, slope)).detach().requires_grad_()
        assert float(torch.autograd.grad(loss(flat), flat)[0].norm()) < 1e-12
        return float(self.val_of(unflatten(flat, like)).detach())

    def slope(self, index: int, entry: int, epsilon: float = 1e-4) -> float:
        """Central difference of L_V(w*(λ), λ) by one entry of λ, the inner problem re-solved."""
        flat = self.hypers()[index].data.view(-1)
        centre, values = float(flat[entry]), []
        try:
            for sign in (1.0, -1.0):
                flat[entry] = centre + sign * epsilon
                values.append(self.val_at_minimum())
        finally:
            flat[entry] = centre
        return (values[0] - values[1]) / (2.0 * epsilon)

    def gradient(self, **arguments: Any) -> Hypergradient:
        weights = self.weights()
        return hypergradient(
            self.train_of(weights), self.val_of(weights), self.net, self.hyper, **arguments
        )


@functools.cache
def _minimum(kind: str) -> list[Tensor]:
    setup = Setup(kind)
    return minimise(setup.train_of, setup.weights())[0]


def solved_setup(kind: str, val: str = "plain") -> Setup:
    setup = Setup(kind, val)
    setup.settle(_minimum(kind))
    return setup


def solved_quadratic(seed: int = 0, weights: int = 6, hypers: int = 3) -> Quadratic:
    problem = Quadratic(weights, hypers, seed)
    with torch.no_grad():
        problem.weights()[0].copy_(problem.solution())
    return problem


def of_problem(problem: Quadratic, **arguments: Any) -> Hypergradient:
    losses = problem.train_loss(None), problem.val_loss(None)
    return hypergradient(*losses, problem.model, problem.hyper, **arguments)


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    return float((flatten(found) - flatten(truth)).norm() / flatten(truth).norm())


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "inverse",
    [Dense(), ConjugateGradient(max_steps=50, tolerance=1e-13), Neumann(terms=400, alpha=1.0)],
    ids=lambda i: str(i.name),
)
@pytest.mark.parametrize(("seed", "weights", "hypers"), [(0, 6, 3), (1, 2, 9), (2, 1, 1)])
def test_closed_form_of_the_quadratic(
    inverse: Inverse, seed: int, weights: int, hypers: int
) -> None:
    problem = solved_quadratic(seed, weights, hypers)
    result = of_problem(problem, inverse=inverse)
    assert relative_error(result.grads, [problem.exact_hypergradient()]) < 1e-9
    assert result.status is SolveStatus.CONVERGED
    assert result.usable


@pytest.mark.parametrize("kind", SETUPS)
@pytest.mark.parametrize("val", VAL_LOSSES)
def test_finite_differences_of_the_resolved_problem(kind: str, val: str) -> None:
    setup = solved_setup(kind, val)
    result = setup.gradient(inverse=Dense())
    assert result.status is SolveStatus.CONVERGED
    size = float(flatten(result.grads).norm())
    for index, grad in enumerate(result.grads):
        for entry in range(0, grad.numel(), 3):
            found = float(grad.flatten()[entry])
            assert found == pytest.approx(setup.slope(index, entry), rel=1e-5, abs=1e-6 * size)


def test_a_direct_dependence_adds_its_gradient() -> None:
    direct = [0.1 * h.detach().cos() for h in solved_setup("decay").hypers()]
    with_direct, without = (
        solved_setup("decay", v).gradient(inverse=Dense()) for v in ("sees λ", "")
    )
    difference = [a - b for a, b in zip(with_direct.grads, without.grads, strict=True)]
    assert relative_error(difference, direct) < 1e-9


def test_default_inverse_is_neumann_with_five_terms_and_points_downhill() -> None:
    setup = solved_setup("decay")
    result = setup.gradient()
    exact = flatten(setup.gradient(inverse=Dense()).grads)
    found = flatten(result.grads)
    assert result.status is SolveStatus.TRUNCATED
    assert result.stats.hvps == 12 + 5
    assert float(found @ exact / (found.norm() * exact.norm())) > 0.8
    same = setup.gradient(inverse=Neumann(terms=5, alpha="auto")).grads
    assert torch.equal(flatten(same), found)


@pytest.mark.parametrize("name", sorted(INVERSES))
@pytest.mark.parametrize("warm", [False, True])
def test_products_are_counted_for_every_inverse(
    name: str, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = 0
    genuine = Hessian._product

    def counting(operator: Hessian, vector: list[Tensor]) -> list[Tensor]:
        nonlocal spent
        spent += 1
        return genuine(operator, vector)

    problem = solved_quadratic()
    earlier = of_problem(problem, inverse=INVERSES[name]()).warm if warm else None
    monkeypatch.setattr(Hessian, "_product", counting)
    result = of_problem(problem, inverse=INVERSES[name](), warm=earlier)
    assert result.stats.hvps == spent
    assert result.stats.seconds > 0.0


@pytest.mark.parametrize(
    ("inverse", "products"),
    [
        (Identity(), 0),
        (Neumann(terms=4, alpha=0.1), 4),
        (Neumann(terms=4), 16),
        (ConjugateGradient(max_steps=3), 4),
        (ConjugateGradient(max_steps=3, damping=0.1), 4),
        (Nystrom(rank=5), 5),
        (Dense(), 18),
        (Dense(damping=0.1), 18),
    ],
    ids=str,
)
def test_products_are_counted(inverse: Inverse, products: int) -> None:
    assert solved_setup("decay").gradient(inverse=inverse).stats.hvps == products


def test_closed_form_penalty_equals_the_penalty_through_autograd() -> None:
    setup = solved_setup("decay", "sees λ")
    weights = setup.weights()
    assert setup.decay is not None
    data_loss = F.cross_entropy(setup.logits(weights, setup.train_data[0]), setup.train_data[1])
    for inverse in (Dense(), Neumann(terms=3, alpha=0.5), ConjugateGradient()):
        closed = hypergradient(
            data_loss,
            setup.val_of(weights),
            setup.net,
            setup.hyper,
            inverse=inverse,
            penalty=setup.decay.penalty(),
        )
        assert relative_error(closed.grads, setup.gradient(inverse=inverse).grads) < 1e-10
        assert torch.equal(closed.train_loss, data_loss.detach())


def test_a_loss_of_penalty_and_a_constant_gradient_needs_no_autograd_curvature() -> None:
    net = nn.Linear(2, 1, bias=False).double()
    decay = WeightDecay(net, "weight", init=0.5, transform="exp")
    slope = torch.tensor([1.0, -2.0], dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(slope[None])  # 2·0.5·w = slope
    result = hypergradient(
        -(net.weight @ slope).sum(),
        net.weight.square().sum(),
        net,
        decay,
        inverse=Dense(),
        penalty=decay.penalty(),
    )
    # w* = slope/(2c), so L_V = Σ slope²/(4c²) and dL_V/dλ = −Σ slope²/(2c²) for c = exp(λ).
    torch.testing.assert_close(result.grads[0], -2.0 * slope.square()[None])


@pytest.mark.parametrize("kind", SETUPS)
def test_gauss_newton_is_exact_where_the_model_is_linear(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    targets, index = torch.arange(EXAMPLES) % 2, torch.arange(EXAMPLES)
    net = nn.Linear(3, 2, bias=False).double()
    decay = WeightDecay(net, init=0.1)
    examples = ExampleWeights(EXAMPLES, like=inputs)
    hyper: nn.Module = decay if kind == "decay" else examples
    outputs = net(inputs)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    loss = (examples.weigh(losses, index) if kind == "examples" else losses).mean()
    val = net(inputs).square().mean()
    hessian, gauss_newton = (
        hypergradient(loss, val, net, hyper, inverse=Dense(), penalty=decay.penalty(), outputs=o)
        for o in (None, outputs)
    )
    assert relative_error(gauss_newton.grads, hessian.grads) < 1e-10


def test_gauss_newton_stays_positive_where_the_hessian_does_not() -> None:
    setup = solved_setup("examples")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in setup.weights():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    outputs = setup.logits(setup.weights(), setup.train_data[0])
    assert setup.examples is not None
    losses = F.cross_entropy(outputs, setup.train_data[1], reduction="none")
    loss = setup.examples.weigh(losses, torch.arange(EXAMPLES)).mean()
    val = setup.val_of(setup.weights())
    hessian, gauss_newton = (
        hypergradient(
            loss, val, setup.net, setup.hyper, inverse=Dense(damping=1e-3), outputs=o
        ).status
        for o in (None, outputs)
    )
    assert (hessian, gauss_newton) == (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.CONVERGED)


def test_gauss_newton_with_a_penalty_on_weights_the_outputs_do_not_see() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}).double()
    decay = WeightDecay(net, init=0.1)
    outputs = net["used"](torch.ones(3, 2, dtype=torch.float64))
    losses = outputs.square().mean(), outputs.sum()
    hessian, gauss_newton = (
        hypergradient(*losses, net, decay, inverse=Dense(), penalty=decay.penalty(), outputs=o)
        for o in (None, outputs)
    )
    assert relative_error(gauss_newton.grads, hessian.grads) < 1e-12


@pytest.mark.parametrize("place", ["train", "val", "both"])
def test_weights_may_be_unused_in_a_loss(place: str) -> None:
    problem = solved_quadratic()
    idle = leaf(1.0, 2.0)
    weights = {"idle": idle, "w": problem.weights()[0]}
    train, val = problem.train_loss(None), problem.val_loss(None)
    if place == "val":  # λ moves `idle` too, but L_V does not see it
        train = train + (idle - problem.hypers()[0][:2]).square().sum()
    if place == "train":  # a fixed contribution to L_V
        val = val + idle.square().sum()
    result = hypergradient(train, val, weights, problem.hyper, inverse=Dense())
    assert relative_error(result.grads, [problem.exact_hypergradient()]) < 1e-9


def test_weights_unused_in_the_training_loss_and_named_by_the_penalty() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}).double()
    decay = WeightDecay(net, init=0.1)
    inputs = torch.ones(3, 2, dtype=torch.float64)
    loss = net["used"](inputs).square().mean()
    val = (net["used"](inputs) + net["idle"](inputs) - 1.0).square().mean()
    closed = hypergradient(loss, val, net, decay, inverse=Dense(), penalty=decay.penalty())
    open_ = hypergradient(loss + decay(), val, net, decay, inverse=Dense())
    assert relative_error(closed.grads, open_.grads) < 1e-10


def test_validation_that_sees_only_hyperparameters_has_only_the_direct_term() -> None:
    problem = solved_quadratic()
    hyper = problem.hypers()[0]
    for name in sorted(INVERSES):
        result = hypergradient(
            problem.train_loss(None),
            hyper.pow(3).sum(),
            problem.model,
            problem.hyper,
            inverse=INVERSES[name](),
        )
        torch.testing.assert_close(result.grads[0], 3.0 * hyper.detach().square())


@pytest.mark.parametrize("added", ["nothing", "a term without weights", "a detached use"])
def test_unreachable_hyperparameters_are_named(added: str) -> None:
    problem = solved_quadratic()
    lost, train, val = leaf(0.5), problem.train_loss(None), problem.val_loss(None)
    if added == "a term without weights":
        train = train + lost.square().sum()
    elif added == "a detached use":
        train = train + (lost.detach() * problem.weights()[0]).sum()
    hypers = {"lost_rate": lost, "coupling": problem.hypers()[0]}
    with pytest.raises(UnreachableHyperparameterError, match="lost_rate: ") as caught:
        hypergradient(train, val, problem.model, hypers)
    assert "coupling" not in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_all_unreachable_hyperparameters_are_named_at_once() -> None:
    problem = solved_quadratic()
    hypers = {"one": leaf(0.5), "two": leaf(0.5), "coupling": problem.hypers()[0]}
    with pytest.raises(UnreachableHyperparameterError, match=r"one, two: .* depend on them"):
        hypergradient(problem.train_loss(None), problem.val_loss(None), problem.model, hypers)


@pytest.mark.parametrize("with_outputs", [False, True])
def test_nothing_is_written_and_the_graphs_stay_usable(with_outputs: bool) -> None:
    setup = solved_setup("examples", "sees λ")
    weights, hypers = setup.weights(), setup.hypers()
    tensors = [*weights, *hypers]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    rng = torch.get_rng_state()
    train, val = setup.train_of(weights), setup.val_of(weights)
    outputs = None
    if with_outputs:
        outputs = setup.logits(weights, setup.train_data[0])
        train = F.cross_entropy(outputs, setup.train_data[1], reduction="none")
        train = setup.hypers()[0].sigmoid().mul(train).mean()
    inverse = ConjugateGradient(damping=0.1)
    first, again = (
        hypergradient(train, val, setup.net, setup.hyper, inverse=inverse, outputs=outputs)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.grads, again.grads, strict=True))
    assert all(t.grad is None for t in tensors)
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(t.requires_grad for t in tensors)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(t.requires_grad for t in [*first.grads, first.train_loss, first.val_loss])
    assert [g.shape for g in first.grads] == [h.shape for h in hypers]
    (train + val).backward()  # type: ignore[no-untyped-call]
    assert all(t.grad is not None for t in tensors)


def test_existing_gradients_are_left_alone() -> None:
    problem = solved_quadratic()
    kept = [torch.full_like(t, 7.0) for t in (problem.weights()[0], problem.hypers()[0])]
    problem.weights()[0].grad, problem.hypers()[0].grad = kept
    of_problem(problem)
    assert problem.weights()[0].grad is kept[0]
    assert problem.hypers()[0].grad is kept[1]
    assert all(bool((k == 7.0).all()) for k in kept)


def test_modules_mappings_and_lists_give_the_same() -> None:
    setup = solved_setup("decay")
    train, val = setup.train_of(setup.weights()), setup.val_of(setup.weights())
    results = [
        flatten(hypergradient(train, val, w, h, inverse=Dense()).grads)
        for w, h in (
            (setup.net, setup.hyper),
            (dict(setup.net.named_parameters()), dict(setup.hyper.named_parameters())),
            (setup.weights(), setup.hypers()),
            (iter(setup.weights()), tuple(setup.hypers())),
        )
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_grads_follow_the_order_of_the_hypers() -> None:
    setup = solved_setup("decay")
    train, val = setup.train_of(setup.weights()), setup.val_of(setup.weights())
    forth = hypergradient(train, val, setup.net, setup.hypers(), inverse=Dense()).grads
    back = hypergradient(train, val, setup.net, setup.hypers()[::-1], inverse=Dense()).grads
    assert all(torch.equal(a, b) for a, b in zip(forth, back[::-1], strict=True))


def test_a_penalty_may_have_hyperparameters_that_are_not_asked_for() -> None:
    setup = solved_setup("decay")
    assert setup.decay is not None
    weights = setup.weights()
    data_loss = F.cross_entropy(setup.logits(weights, setup.train_data[0]), setup.train_data[1])
    whole, part = (
        hypergradient(
            data_loss,
            setup.val_of(weights),
            setup.net,
            hypers,
            inverse=Dense(),
            penalty=setup.decay.penalty(),
        ).grads
        for hypers in (setup.hypers(), setup.hypers()[1:2])
    )
    assert torch.equal(part[0], whole[1])


@pytest.mark.parametrize(
    "inverse", [Neumann(terms=3, alpha=1.0), ConjugateGradient(max_steps=2, tolerance=1e-12)]
)
def test_warm_starts_reduce_the_residual_until_the_answer_is_exact(inverse: Inverse) -> None:
    problem = solved_quadratic()
    warm: WarmStart | None = None
    residuals, errors = [], []
    for _ in range(60):
        result = of_problem(problem, inverse=inverse, warm=warm)
        warm = result.warm
        assert result.stats.residual_norm is not None
        residuals.append(result.stats.residual_norm)
        errors.append(relative_error(result.grads, [problem.exact_hypergradient()]))
    assert residuals[1] < residuals[0]
    assert residuals[-1] < 1e-9 * residuals[0]
    assert errors[-1] < 1e-9 < errors[0]


@pytest.mark.parametrize(
    "inverse",
    [
        Neumann(terms=3, alpha=1.0),
        ConjugateGradient(damping=0.1),
        Nystrom(rank=6, damping=0.1),
        Dense(damping=0.1),
    ],
    ids=lambda i: str(i.name),
)
def test_the_answer_of_the_system_is_a_fixed_point_of_warm_starts(inverse: Inverse) -> None:
    """The system is that of the inverse: its damping, where it has one, included."""
    problem = solved_quadratic()
    damping = float(getattr(inverse, "damping", 0.0))
    matrix = problem.matrix + damping * torch.eye(6, dtype=torch.float64)
    slope = (problem.weights()[0] - problem.goal).detach()
    exact = [torch.linalg.solve(matrix, slope)]
    result = of_problem(problem, inverse=inverse, warm=WarmStart(exact))
    assert result.warm.solution is not None
    assert relative_error(result.warm.solution, exact) < 1e-9


def test_identity_takes_no_guess_for_it_could_not_refine_it() -> None:
    problem = solved_quadratic()
    cold = of_problem(problem, inverse=Identity())
    warm = of_problem(problem, inverse=Identity(), warm=WarmStart([torch.ones(6).double()]))
    assert torch.equal(cold.grads[0], warm.grads[0])
    assert warm.stats.hvps == 0


def test_warm_nystrom_does_not_drift_where_the_hessian_is_flat() -> None:
    weight, hyper = leaf(1.0, 1.0), leaf(1.0)
    train = 0.5 * (weight[0] - hyper[0]).square()  # no curvature along the second weight
    warm: WarmStart | None = None
    sizes = []
    for _ in range(5):
        result = hypergradient(
            train,
            weight.sum(),
            [weight],
            [hyper],
            inverse=Nystrom(rank=2, damping=0.1),
            warm=warm,
        )
        warm = result.warm
        assert warm.solution is not None
        sizes.append(float(flatten(warm.solution).norm()))
    assert sizes[-1] == pytest.approx(sizes[0], rel=0.1)


@pytest.mark.parametrize(
    "inverse",
    [Neumann(terms=3, alpha=1.0), ConjugateGradient(max_steps=3, tolerance=1e-5)],
    ids=lambda i: str(i.name),
)
def test_warm_residual_is_relative_to_the_validation_gradient(inverse: Inverse) -> None:
    problem = solved_quadratic()
    slope = (problem.weights()[0] - problem.goal).detach()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, generator=generator, dtype=torch.float64)
    near = [torch.linalg.solve(problem.matrix, slope) + 1e-7 * noise]
    result = of_problem(problem, inverse=inverse, warm=WarmStart(near))
    assert result.stats.residual_norm is not None
    assert result.stats.relative_residual == pytest.approx(
        result.stats.residual_norm / float(slope.norm()), rel=1e-9
    )
    assert result.status is SolveStatus.CONVERGED


def test_warm_conjugate_gradient_spends_nothing_on_a_solved_system() -> None:
    problem = solved_quadratic()
    slope = (problem.weights()[0] - problem.goal).detach()
    exact = WarmStart([torch.linalg.solve(problem.matrix, slope)])
    result = of_problem(problem, inverse=ConjugateGradient(tolerance=1e-6), warm=exact)
    assert result.stats.hvps == 1


def test_a_warm_eigenpair_saves_products_and_sharpens_the_estimate() -> None:
    problem = solved_quadratic()
    truth = float(torch.linalg.eigvalsh(problem.matrix)[-1])
    result, estimates = of_problem(problem), []
    assert result.stats.hvps == 12 + 5
    short = Neumann(terms=2)
    result = of_problem(problem, inverse=short)
    for _ in range(30):
        warm = WarmStart(eigenpair=result.warm.eigenpair)
        result = of_problem(problem, inverse=short, warm=warm)
        assert result.stats.hvps == 2 + 2
        assert result.warm.eigenpair is not None
        estimates.append(result.warm.eigenpair.value)
    assert estimates == sorted(estimates) or estimates[-1] == pytest.approx(truth, rel=1e-12)
    assert estimates[-1] == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("terms", [3, 5, 12])
@pytest.mark.parametrize("scale", [1.0, 1.8])
def test_a_series_tells_the_next_one_its_step_for_nothing(terms: int, scale: float) -> None:
    problem = solved_quadratic()
    inverse = Neumann(terms=terms, alpha_scale=scale)
    truth = float(torch.linalg.eigvalsh(problem.matrix)[-1])
    result = of_problem(problem, inverse=inverse)
    assert result.stats.hvps == 12 + terms
    for _ in range(40):
        warm = WarmStart(eigenpair=result.warm.eigenpair)
        result = of_problem(problem, inverse=inverse, warm=warm)
        assert result.stats.hvps == terms
        assert result.status in (SolveStatus.TRUNCATED, SolveStatus.CONVERGED)
        pair, seen = result.warm.eigenpair, result.stats.largest_eigenvalue
        assert pair is not None
        assert seen is not None
        assert seen <= truth * (1.0 + 1e-9)  # Ritz values are bounds from inside
        assert not pair.vector
    assert pair is not None
    assert 0.9 * truth < pair.value <= truth * (1.0 + 1e-9)


@pytest.mark.parametrize("wrong", [1e-3, 0.2, 40.0])
def test_a_wrong_estimate_is_mended_by_the_series_itself(wrong: float) -> None:
    problem = solved_quadratic()
    truth = float(torch.linalg.eigvalsh(problem.matrix)[-1])
    warm = WarmStart(eigenpair=Eigenpair(wrong * truth, []))
    for _ in range(45):  # it falls by a tenth a step, and rises at once
        result = of_problem(problem, inverse=Neumann(terms=6), warm=warm)
        warm = WarmStart(eigenpair=result.warm.eigenpair)
    assert warm.eigenpair is not None
    assert warm.eigenpair.value == pytest.approx(truth, rel=0.1)
    assert result.status is SolveStatus.TRUNCATED


class _OnceOnly(torch.autograd.Function):
    """x², with a derivative that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = 2.0 * x * gradient
        return found


def _attention(weight: Tensor) -> Tensor:
    heads = weight.reshape(1, 1, 4, 8)
    return F.scaled_dot_product_attention(heads, heads, heads)


def _once_only(weight: Tensor) -> Tensor:
    found: Tensor = _OnceOnly.apply(weight)  # type: ignore[no-untyped-call]
    return found


@pytest.mark.parametrize(
    ("function", "name", "mend"),
    [
        (_attention, "attention", "safe_kernels"),
        (_once_only, "_OnceOnly", "write the function's backward with differentiable operations"),
    ],
)
def test_operations_without_second_derivative_are_named_with_the_mend(
    function: Callable[[Tensor], Tensor], name: str, mend: str
) -> None:
    weight = torch.linspace(0.1, 1.0, 32).requires_grad_()
    hyper = torch.ones(1, requires_grad=True)
    train = (hyper * function(weight)).square().sum()
    with pytest.raises(DoubleBackwardError, match=name) as caught:
        hypergradient(train, weight.sum(), [weight], [hyper], inverse=Neumann(terms=1, alpha=0.1))
    assert mend in str(caught.value)


def test_curvature_that_autograd_hides_is_not_taken_for_zero() -> None:
    weight, hyper = leaf(0.5, 1.0), leaf(1.0)
    train = _once_only(weight).sum() - (hyper * weight).sum()
    with pytest.raises(DoubleBackwardError):
        hypergradient(train, weight.sum(), [weight], [hyper], inverse=ConjugateGradient())


def test_safe_kernels_are_the_mend_for_attention() -> None:
    weight = torch.linspace(0.1, 1.0, 32, dtype=torch.float64).requires_grad_()
    hyper = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with safe_kernels():
        train = (hyper * _attention(weight)).square().sum()
    result = hypergradient(
        train, weight.sum(), [weight], [hyper], inverse=Neumann(terms=1, alpha=0.1)
    )
    assert bool(torch.isfinite(result.grads[0]).all())


def _losses() -> dict[str, Any]:
    w, h = leaf(1.0, 2.0), leaf(0.5)
    return {
        "train_loss": (h * w.square()).sum(),
        "val_loss": w.square().sum(),
        "weights": [w],
        "hypers": [h],
    }


def _without_graph() -> Tensor:
    with torch.no_grad():
        return leaf(1.0).sum()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"train_loss": torch.ones(3)}, "train_loss must be a scalar tensor, got (3,)"),
        ({"val_loss": torch.ones(2, 1)}, "reduce it with .mean()"),
        ({"train_loss": 0.5}, "train_loss must be a scalar tensor, got float"),
        ({"train_loss": _without_graph()}, "train_loss has no graph to the weights (weights[0]"),
        ({"val_loss": _without_graph()}, "outside torch.no_grad() and without .detach()"),
        ({"train_loss": leaf(1.0).sum()}, "train_loss depends on none of the weights (weights[0]"),
        ({"weights": []}, "weights is empty"),
        ({"hypers": {}}, "hypers is empty"),
        ({"weights": leaf(1.0)}, "pass [weights]"),
        ({"hypers": [torch.ones(1)]}, "call hypers[0].requires_grad_()"),
        (
            {"weights": {"w": torch.ones(2, dtype=torch.float16, requires_grad=True)}},
            "w is torch.float16; second derivatives need float32 or float64",
        ),
        ({"hypers": [torch.ones(1, dtype=torch.bfloat16, requires_grad=True)]}, "hypers[0] is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_refused_with_the_mend(change: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        hypergradient(**{**_losses(), **change})


def test_losses_that_are_not_finite_give_a_status_and_no_exception() -> None:
    w, h = leaf(0.0, 1.0), leaf(0.5)
    val = w.sqrt().sum()
    for name in sorted(INVERSES):
        result = hypergradient((h * w.square()).sum(), val, [w], [h], inverse=INVERSES[name]())
        assert result.status is SolveStatus.NONFINITE
        assert not result.usable


def test_a_hessian_that_is_not_finite_gives_a_status_and_no_exception() -> None:
    w, h = leaf(0.0, 1.0), leaf(0.5)
    train = (h * w.abs().pow(1.5)).sum() + h.sum() * w.sum()  # curvature infinite at 0
    for name in sorted(set(INVERSES) - {Identity.name}):
        result = hypergradient(train, w.sum(), [w], [h], inverse=INVERSES[name]())
        assert result.status is SolveStatus.NONFINITE
        assert not result.usable


@pytest.mark.parametrize(("alpha", "usable"), [(1.0, True), (3.0, True), (50.0, False)])
def test_usable_until_the_series_is_its_last_term(alpha: float, usable: bool) -> None:
    problem = solved_quadratic()
    top = float(torch.linalg.eigvalsh(problem.matrix)[-1])
    result = of_problem(problem, inverse=Neumann(terms=4, alpha=alpha / top))
    assert result.usable == usable


def test_a_reentrant_checkpoint_is_refused_for_it_hides_its_curvature() -> None:
    problem = solved_quadratic()
    (weight,) = problem.weights()
    loss = checkpoint(lambda w: problem.train_loss(None) + w.sum(), weight, use_reentrant=True)
    with pytest.raises(DoubleBackwardError, match="use_reentrant=False"):
        hypergradient(loss, problem.val_loss(None), problem.model, problem.hyper)


def test_a_tensor_is_a_weight_or_a_hyperparameter() -> None:
    problem = solved_quadratic()
    with pytest.raises(UsageError, match="not both"):
        hypergradient(
            problem.train_loss(None), problem.val_loss(None), problem.model, problem.weights()
        )


def test_a_guess_that_is_worse_than_none_is_dropped() -> None:
    problem = solved_quadratic()
    cold = of_problem(problem, inverse=Neumann(terms=3, alpha=1.0))
    bad = WarmStart([torch.full((6,), 1e6, dtype=torch.float64)])
    warm = of_problem(problem, inverse=Neumann(terms=3, alpha=1.0), warm=bad)
    assert torch.equal(cold.grads[0], warm.grads[0])


def test_an_eigenpair_that_was_overtaken_is_not_handed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = solved_quadratic()
    values, vectors = torch.linalg.eigh(problem.matrix)
    # Orthogonal to the top eigenvector, which the two warm power steps so cannot find.
    stale = Eigenpair(float(values[1]), [vectors[:, 1].contiguous()])
    with caplog.at_level(logging.DEBUG, logger="ift_tune"):
        result = of_problem(problem, inverse=Neumann(terms=2), warm=WarmStart(eigenpair=stale))
    assert result.warm.eigenpair is None
    assert "eigenvector not handed on" in caplog.text
    good = Eigenpair(float(values[-1]), [vectors[:, -1].contiguous()])
    result = of_problem(problem, inverse=Neumann(terms=2), warm=WarmStart(eigenpair=good))
    assert result.warm.eigenpair is not None
