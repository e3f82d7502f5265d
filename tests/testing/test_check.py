"""The check must pass what is right, and fail or refuse what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ift_tune.base.errors import (
    CheckFailedError,
    DoubleBackwardError,
    UnreachableHyperparameterError,
    UsageError,
)
from ift_tune.base.status import SolveStatus
from ift_tune.hyper import WeightDecay
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import flatten, relative_error, zeros_like
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.testing import (
    CheckReport,
    Comparison,
    Quadratic,
    check_hypergradient,
    frozen,
    random_spd,
)
from ift_tune.testing.frozen import minimise


class Points(NamedTuple):
    """A batch with names."""

    inputs: Tensor
    targets: Tensor


class Ridge(BilevelProblem):
    """Regression by a net of 9 weights in float32, a decay for every weight."""

    def __init__(
        self,
        dropout: str = "",
        batch: type[tuple[Tensor, ...]] = tuple,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.own: torch.Generator | None = None

        def points() -> Points:
            inputs = torch.randn(8, 2, generator=generator)
            return Points(inputs, inputs.prod(dim=1, keepdim=True))

        self.model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout(0.5), nn.Linear(2, 1))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.hyper: nn.Module = WeightDecay(self.model, "weight", init=0.02)
        self.dropout, self.named = dropout, batch is Points
        train, val = ([p if self.named else tuple(p)] for p in (points(), points()))
        self.splits = Splits(train, val, val, val)

    def loss(self, batch: Points, name: str) -> Tensor:
        inputs, targets = (batch.inputs, batch.targets) if self.named else batch
        if self.dropout == name:
            kept = torch.rand(inputs.shape, generator=self.own, dtype=inputs.dtype) > 0.5
            inputs = 2.0 * inputs * kept
        loss: Tensor = (self.model(inputs) - targets).square().mean()
        return loss

    def train_loss(self, batch: Points) -> Tensor:
        return self.loss(batch, "train")

    def val_loss(self, batch: Points) -> Tensor:
        return self.loss(batch, "val")

    def penalty(self) -> Penalty | None:
        assert isinstance(self.hyper, WeightDecay)
        return self.hyper.penalty()


class Broken(Penalty):
    """A decay with one method wrong."""

    def __init__(self, right: Penalty, wrong: str) -> None:
        self.right, self.wrong, self.hypers = right, wrong, right.hypers

    def factor(self, method: str) -> float:
        return -1.0 if method == self.wrong else 1.0

    def value(self, weights: Sequence[Tensor]) -> Tensor:
        return self.right.value(weights)

    def add_gradient_(self, gradient: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        slope = zeros_like(weights)
        self.right.add_gradient_(slope, weights)
        for total, part in zip(gradient, slope, strict=True):
            total.add_(self.factor("gradient") * part)

    def hvp(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        return [self.factor("Hessian product") * p for p in self.right.hvp(weights, vector)]

    def mixed(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        return [self.factor("mixed product") * p for p in self.right.mixed(weights, vector)]


class BrokenRidge(Ridge):
    """`Ridge` with one method of its penalty wrong."""

    wrong = ""

    def penalty(self) -> Penalty | None:
        right = super().penalty()
        assert right is not None
        return Broken(right, self.wrong)


class Detached(Quadratic):
    """A validation loss whose value depends on λ where its graph does not: a wrong direct term."""

    def val_loss(self, batch: object) -> Tensor:
        hidden: Tensor = self.hyper().detach().square().sum()
        loss: Tensor = 0.5 * (self.model() - self.goal).square().sum()
        return loss + 0.5 * hidden


class Handwritten(Ridge):
    """The decay in the training loss by hand, as `WeightDecay.forward` offers it."""

    def train_loss(self, batch: Points) -> Tensor:
        decay: Tensor = self.hyper()
        return super().train_loss(batch) + decay

    def penalty(self) -> None:
        return None


class OnlyMatrices(Penalty):
    """r = exp(λ)·Σ w² over the matrices alone: biases are left out."""

    def __init__(self, raw: Tensor) -> None:
        self.hypers = [raw]

    def value(self, weights: Sequence[Tensor]) -> Tensor:
        squares: Tensor = flatten([w for w in weights if w.ndim > 1]).square().sum()
        return self.hypers[0].exp() * squares

    @torch.no_grad()
    def add_gradient_(self, gradient: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        for total, part in zip(gradient, self.hvp(weights, weights), strict=True):
            total.add_(part)

    @torch.no_grad()
    def hvp(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        scale = 2.0 * self.hypers[0].exp()
        return [scale * v if v.ndim > 1 else torch.zeros_like(v) for v in vector]

    @torch.no_grad()
    def mixed(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(weights, self.hvp(weights, vector), strict=True)
        return [torch.stack([(w * p).sum() for w, p in pairs]).sum()]


class MatricesOnly(Ridge):
    """`Ridge` whose biases are not decayed."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.ParameterList([torch.tensor(-3.0)])

    def penalty(self) -> Penalty | None:
        return OnlyMatrices(next(self.hyper.parameters()))


def fast(problem: BilevelProblem, **changes: bool) -> CheckReport:
    return check_hypergradient(problem, directions=1, unrolled_steps=3, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_the_quadratic_passes(seed: int) -> None:
    report = check_hypergradient(Quadratic(seed=seed))
    assert report.passed
    assert len(report.comparisons) == 3 + 1
    assert max(c.error for c in report.comparisons) < 1e-6
    assert report.status is SolveStatus.CONVERGED
    assert (report.weights, report.hypers) == (6, 3)


@pytest.mark.parametrize("batch", [tuple, Points])
def test_a_net_in_single_precision_passes(batch: type[tuple[Tensor, ...]]) -> None:
    report = fast(Ridge(batch=batch))
    assert report.passed
    assert report.stationarity < 1e-8
    assert len([c for c in report.comparisons if "closed-form penalty" in c.name]) == 3


@pytest.mark.parametrize("make", [Handwritten, MatricesOnly])
def test_other_ways_to_regularise_pass(make: Callable[[], BilevelProblem]) -> None:
    assert fast(make()).passed


@pytest.mark.parametrize("wrong", ["mixed product", "Hessian product", "gradient"])
def test_a_penalty_with_a_wrong_sign_fails_and_is_named(wrong: str) -> None:
    problem = BrokenRidge()
    problem.wrong = wrong
    with pytest.raises(CheckFailedError, match=rf"FAIL closed-form penalty, {wrong}") as caught:
        fast(problem)
    failed = [line for line in str(caught.value).splitlines() if "FAIL" in line]
    assert any("finite differences" in line for line in failed) == (wrong != "gradient")
    assert not any("unrolled" in line for line in failed) or wrong != "gradient"


def test_a_wrong_hypergradient_fails_by_finite_differences_alone() -> None:
    report = fast(Detached(), raise_on_failure=False)
    assert [c.passed for c in report.comparisons] == [False, True]
    assert not report.passed
    with pytest.raises(CheckFailedError, match="FAIL finite differences"):
        fast(Detached())


@pytest.mark.parametrize("place", ["train", "val"])
def test_noise_from_a_generator_of_ones_own_is_refused(place: str) -> None:
    torch.manual_seed(0)
    problem = Ridge(dropout=place)
    problem.own = torch.default_generator.clone_state()
    with pytest.raises(UsageError, match="random numbers from the global generators"):
        fast(problem)


@pytest.mark.parametrize("place", ["train", "val"])
def test_noise_from_the_global_generators_is_held_still(place: str) -> None:
    problem = Ridge(dropout=place)
    before = torch.get_rng_state()
    assert fast(problem).passed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_problem_is_refused_before_any_work() -> None:
    problem = Ridge()
    with pytest.raises(UsageError, match=r"9 × 9 Hessian.*\(at most 8 weights\)"):
        check_hypergradient(problem, max_weights=8)
    problem.model.add_module("wide", nn.Linear(100, 100))
    with pytest.raises(UsageError, match="smaller model"):
        check_hypergradient(problem)


@pytest.mark.parametrize(("directions", "steps"), [(0, 1), (1, 0)])
def test_nothing_to_compare_is_refused(directions: int, steps: int) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        check_hypergradient(Quadratic(), directions=directions, unrolled_steps=steps)


class Unbounded(Quadratic):
    """A training loss without a minimum."""

    def train_loss(self, batch: object) -> Tensor:
        loss: Tensor = (self.model() * self.hyper().exp().sum()).sum()
        return loss


class Unreached(Quadratic):
    """Losses without λ."""

    def train_loss(self, batch: object) -> Tensor:
        loss: Tensor = 0.5 * (self.model() - 1.0).square().sum()
        return loss

    val_loss = train_loss


class _Square(torch.autograd.Function):
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


class Once(Quadratic):
    """A training loss without a second derivative."""

    def train_loss(self, batch: object) -> Tensor:
        squares: Tensor = _Square.apply(self.model())  # type: ignore[no-untyped-call]
        loss: Tensor = 0.5 * squares.sum() - (self.model() @ self.coupling) @ self.hyper()
        return loss


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (Unbounded, UsageError, "no stationary point.*add a weight decay"),
        (Unreached, UnreachableHyperparameterError, "value"),
        (Once, DoubleBackwardError, "_Square.*differentiable operations"),
    ],
)
def test_problems_outside_the_theorem_raise_the_error_that_names_the_cause(
    make: Callable[[], BilevelProblem], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fast(make())


@pytest.mark.parametrize("make", [Ridge, Detached, lambda: Ridge(dropout="train")])
def test_the_problem_and_the_random_state_are_not_changed(
    make: Callable[[], BilevelProblem],
) -> None:
    problem = make()
    tensors = [*problem.weights(), *problem.hypers()]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    modes = [m.training for m in problem.model.modules()]
    rng = torch.get_rng_state()
    try:
        fast(problem, raise_on_failure=False)
    except UsageError:
        pass
    else:
        assert torch.equal(torch.get_rng_state(), rng)
    assert all(
        a is b for a, b in zip(tensors, [*problem.weights(), *problem.hypers()], strict=True)
    )
    assert [t._version for t in tensors] == versions
    assert all(
        torch.equal(t, b) and t.dtype == b.dtype for t, b in zip(tensors, before, strict=True)
    )
    assert all(t.grad is None for t in tensors)
    assert [m.training for m in problem.model.modules()] == modes


def test_not_a_number_does_not_pass() -> None:
    assert not Comparison("x", float("nan"), 1.0).passed
    assert Comparison("x", 1.0, 1.0).passed
    report = CheckReport([Comparison("x", 0.5, 1.0, "why"), Comparison("y", 2.0, 1.0)])
    assert not report.passed
    lines = str(report).splitlines()
    assert lines[1].startswith("  ok   x: relative error 5.0e-01 (at most 1e+00); why")
    assert lines[2].startswith("  FAIL y")


def test_a_degenerate_minimum_is_noted() -> None:
    report = CheckReport(status=SolveStatus.SINGULAR)
    assert SolveStatus.SINGULAR.advice in str(report)


def test_relative_error_is_absolute_where_the_truth_is_zero() -> None:
    one, zero = [torch.tensor([3.0, 4.0])], [torch.zeros(2)]
    assert relative_error(one, zero) == 5.0
    assert relative_error(zero, one) == 1.0


@pytest.mark.parametrize(("size", "condition"), [(2, 3.0), (10, 100.0), (40, 1e5)])
def test_random_matrices_have_the_condition_asked_for(size: int, condition: float) -> None:
    matrix = random_spd(size, condition=condition, seed=3)
    values = torch.linalg.eigvalsh(matrix)
    assert torch.equal(matrix, matrix.T)
    assert float(values[-1]) == pytest.approx(1.0)
    assert float(values[0]) == pytest.approx(1.0 / condition, rel=1e-6)
    assert torch.equal(matrix, random_spd(size, condition=condition, seed=3))
    assert not torch.equal(matrix, random_spd(size, condition=condition, seed=4))


def test_quadratic_solution_is_the_minimum() -> None:
    problem = Quadratic(seed=5)
    with torch.no_grad():
        problem.weights()[0].copy_(problem.solution())
    (slope,) = torch.autograd.grad(problem.train_loss(None), problem.weights())
    assert float(slope.norm()) < 1e-12

    def val_at(hyper: Tensor) -> Tensor:
        best = torch.linalg.solve(problem.matrix, problem.coupling @ hyper)
        loss: Tensor = 0.5 * (best - problem.goal).square().sum() + 0.5 * hyper.square().sum()
        return loss

    truth = torch.func.grad(val_at)(problem.hypers()[0].detach())
    torch.testing.assert_close(problem.exact_hypergradient(), truth)


def test_minimise_finds_the_minimum_and_writes_no_gradient() -> None:
    hyper = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)

    def loss(weights: list[Tensor]) -> Tensor:
        return (weights[0] - hyper).pow(2).sum() + (weights[0] - hyper).pow(4).sum()

    (found,), size, _ = minimise(loss, [start])
    torch.testing.assert_close(found, hyper.detach(), rtol=1e-9, atol=1e-9)
    assert size < 1e-9
    assert not bool(start.any())
    assert hyper.grad is None


def test_one_dense_hessian_serves_all_displaced_minima(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves to find them alone: they are found to the last digits all the same."""
    made: list[int] = []
    inverse = frozen._absolute_inverse

    def counted(*args: Any) -> Callable[[Tensor], Tensor]:
        made.append(1)
        return inverse(*args)

    monkeypatch.setattr(frozen, "_absolute_inverse", counted)
    report = check_hypergradient(Ridge(), directions=4)
    alone = len(made)
    assert max(c.error for c in report.comparisons if "finite" in c.name) < 1e-7
    made.clear()
    check_hypergradient(Ridge(), directions=1)
    assert len(made) == alone <= 3
