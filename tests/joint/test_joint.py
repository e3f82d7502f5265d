"""Joint optimisation: every number against a hand-written reference, and nobody is disturbed."""

from __future__ import annotations

import gc
import logging
import math
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ift_tune import (
    Batches,
    BilevelProblem,
    Callback,
    ClassificationProblem,
    ConjugateGradient,
    Dense,
    Hypergradient,
    Identity,
    Inverse,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Nystrom,
    SolveStatus,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.base.errors import NonFiniteError
from ift_tune.base.randomness import GlobalState
from ift_tune.base.status import HEALTH_COLUMNS
from ift_tune.implicit.penalty import Penalty
from ift_tune.joint.config import OPTIMIZERS
from ift_tune.joint.cost import FORWARD, HVP
from ift_tune.problem.batches import Batch
from ift_tune.testing import Quadratic

ROWS = 12


def rows(seed: int, count: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return a small classification data set of three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (count,), generator=generator)


def splits(*, batch_size: int | None = None, dtype: torch.dtype = torch.float64) -> Splits:
    """Return in-memory splits."""
    train, val, search, test = (rows(seed, dtype=dtype) for seed in range(4))
    return Splits(
        Batches(*train, batch_size=batch_size), Batches(*val), Batches(*search), Batches(*test)
    )


def classifier(
    model: Callable[[], nn.Module] | None = None, *, dtype: torch.dtype = torch.float64, **how: Any
) -> ClassificationProblem:
    """Return a decayed classifier, a small MLP unless `model` builds another."""
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) if model is None else model()
    built.to(dtype)
    return ClassificationProblem(
        built, WeightDecay(built, "weight", init=0.05), splits(dtype=dtype, **how)
    )


def config(**changes: Any) -> MetaConfig:
    """Return a configuration of few steps."""
    small: dict[str, Any] = {"inverse": Neumann(terms=2), "inner_steps": 2, "inner_lr": 0.01}
    return MetaConfig(**small | changes)


# One outer step against a hand-written reference


def _plain_optimizer(name: str, params: list[Tensor], lr: float) -> optim.Optimizer:
    if name == "momentum":
        return optim.SGD(params, lr=lr, momentum=0.9, foreach=False)
    every = {kind.__name__.lower(): kind for kind in vars(optim).values() if isinstance(kind, type)}
    options = {"asgd": {"lambd": 0.0}}.get(name, {})
    made: optim.Optimizer = every[name](params, lr=lr, foreach=False, **options)
    return made


def _flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _solve(inverse: Inverse, hessian: Tensor, vector: Tensor) -> Tensor:
    """Return q ≈ H⁻¹v by dense linear algebra, from each method's definition."""
    eye = torch.eye(len(vector), dtype=vector.dtype)
    if isinstance(inverse, Neumann):
        assert isinstance(inverse.alpha, float)
        powers = [
            torch.linalg.matrix_power(eye - inverse.alpha * hessian, j)
            for j in range(inverse.terms + 1)
        ]
        return inverse.alpha * torch.stack(powers).sum(0) @ vector
    if isinstance(inverse, Identity):
        return vector
    assert isinstance(inverse, Dense | ConjugateGradient)
    solution: Tensor = torch.linalg.solve(hessian + inverse.damping * eye, vector)
    return solution


class _Reference:
    """Lorraine, Vicol, Duvenaud 2020, algorithm 1, with whole matrices and autograd only."""

    def __init__(self, problem: ClassificationProblem, config: MetaConfig) -> None:
        self.problem, self.config = problem, config
        self.weights, self.hypers = problem.weights(), problem.hypers()
        self.inner = _plain_optimizer(config.inner_optimizer, self.weights, config.inner_lr)
        self.outer = _plain_optimizer(config.meta_optimizer, self.hypers, config.meta_lr)

    def _train_loss(self) -> Tensor:
        inputs, targets = rows(0)
        decays = [F.softplus(h) for h in self.hypers]
        penalty = sum((c * w**2).sum() for c, w in zip(decays, self.weights, strict=True))
        return F.cross_entropy(self.problem.model(inputs), targets) + penalty

    def step(self) -> None:
        for _ in range(self.config.inner_steps):
            gradients = torch.autograd.grad(self._train_loss(), self.weights)
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.grad = gradient
            self.inner.step()
        inputs, targets = rows(1)
        val_loss = F.cross_entropy(self.problem.model(inputs), targets)
        by_val = _flat(torch.autograd.grad(val_loss, self.weights))
        slope = _flat(torch.autograd.grad(self._train_loss(), self.weights, create_graph=True))

        def rows_of(by: list[Tensor]) -> Tensor:
            return torch.stack(
                [_flat(torch.autograd.grad(s, by, retain_graph=True)) for s in slope]
            )

        solution = _solve(self.config.inverse, rows_of(self.weights), by_val)
        mixed = -solution @ rows_of(self.hypers)
        pieces = torch.split(mixed, [h.numel() for h in self.hypers])
        for hyper, piece in zip(self.hypers, pieces, strict=True):
            hyper.grad = piece.view_as(hyper)
        self.outer.step()


@pytest.mark.parametrize(
    "config",
    [
        *(config(inverse=Neumann(terms=k, alpha=0.5)) for k in (0, 3)),
        config(inverse=Identity()),
        config(inverse=Dense(damping=0.3)),
        config(inverse=ConjugateGradient(max_steps=200, tolerance=1e-14, damping=1.0)),
        *(config(inverse=Dense(damping=0.3), inner_optimizer=name) for name in OPTIMIZERS),
        *(config(inverse=Dense(damping=0.3), meta_optimizer=name) for name in OPTIMIZERS),
        config(inverse=Dense(damping=0.3), inner_steps=7, meta_lr=0.5),
    ],
    ids=lambda c: f"{c.inverse.name}-{c.inner_optimizer}-{c.meta_optimizer}",
)
def test_outer_steps_are_those_of_the_reference(config: MetaConfig) -> None:
    problem, twin = classifier(), classifier()
    joint, reference = JointOptimizer(problem, config), _Reference(twin, config)
    for _ in range(3):
        joint.step()
        reference.step()
        for found, expected in zip(
            problem.weights() + problem.hypers(), twin.weights() + twin.hypers(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_gauss_newton_takes_the_hessians_place() -> None:
    problem = classifier(lambda: nn.Linear(4, 3))  # linear, so that both are the same matrix
    twin = classifier(lambda: nn.Linear(4, 3))
    first = JointOptimizer(problem, config(inverse=Dense(), curvature="gauss_newton"))
    second = JointOptimizer(twin, config(inverse=Dense()))
    assert first.step() == pytest.approx(second.step())
    for found, expected in zip(problem.hypers(), twin.hypers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_gauss_newton_has_no_negative_curvature_where_the_hessian_has() -> None:
    def found(curvature: str) -> JointOptimizer:
        problem = classifier()
        with torch.no_grad():
            for weight, hyper in zip(problem.weights(), problem.hypers(), strict=True):
                weight.mul_(4.0)
                hyper.fill_(-9.0)
        joint = JointOptimizer(problem, config(inverse=Dense(), curvature=curvature))
        joint.step()
        return joint

    assert found("hessian").status is SolveStatus.NEGATIVE_CURVATURE
    assert found("gauss_newton").status is not SolveStatus.NEGATIVE_CURVATURE


def test_the_quadratic_problem_is_solved() -> None:
    problem = Quadratic()
    settings = config(inverse=Dense(), inner_steps=60, inner_lr=0.05, meta_lr=0.1)
    joint = JointOptimizer(problem, settings)
    norms = [joint.step()["hypergradient_norm"] for _ in range(120)]
    assert norms[-1] < 1e-2 * norms[0]
    assert float(problem.exact_hypergradient().norm()) < 1e-2 * norms[0]


# What a step returns


@pytest.mark.parametrize(
    "inverse", [Neumann(), Identity(), ConjugateGradient(), Nystrom(), Dense()]
)
def test_a_step_returns_finite_floats_only(inverse: Inverse) -> None:
    joint = JointOptimizer(classifier(), config(inverse=inverse))
    for _ in range(2):
        metrics = joint.step()
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        assert {"train_loss", "val_loss", "train_error", "val_error"} <= set(metrics)
        assert {"gradient_equivalents", "hvps", "hypergradient_norm", "skipped"} <= set(metrics)
        measured = {"gradient_equivalents", "hvps"}
        assert {k for k in metrics if not k.startswith(("train_", "val_"))} <= measured | {
            *HEALTH_COLUMNS
        }
    assert (joint.outer_steps, joint.inner_steps) == (2, 4)
    assert joint.status is not None


def test_the_reported_losses_are_those_at_the_outer_steps_weights() -> None:
    problem = classifier()
    joint = JointOptimizer(problem, config())
    metrics = joint.step()
    for split in ("train", "val"):
        found = joint.evaluate(split)
        for name in (f"{split}_loss", f"{split}_error"):
            assert metrics[name] == pytest.approx(found[name], rel=1e-12)


def test_evaluation_is_the_mean_over_examples_of_uneven_batches() -> None:
    problem = classifier()
    inputs, targets = rows(3)
    uneven = [(inputs[:9], targets[:9]), (inputs[9:], targets[9:])]
    parts = problem.splits
    problem.splits = Splits(parts.train, parts.val, parts.search, uneven)
    found = JointOptimizer(problem, config()).evaluate("test")
    expected = problem.metrics((inputs, targets))
    assert found == pytest.approx({f"test_{k}": float(v.detach()) for k, v in expected.items()})


def test_an_empty_split_is_named() -> None:
    problem = classifier()
    parts = problem.splits
    problem.splits = Splits(parts.train, parts.val, parts.search, [])
    with pytest.raises(UsageError, match="test loader yields no batch"):
        JointOptimizer(problem, config()).evaluate("test")


# What a step must leave alone


class _Watching(ClassificationProblem):
    """Notes at every training loss whether λ takes part in the graph."""

    def train_loss(self, batch: Batch) -> Tensor:
        self.seen.append(any(h.requires_grad for h in self._all_hypers))
        return super().train_loss(batch)

    def watch(self) -> _Watching:
        self.seen: list[bool] = []
        self._all_hypers = list(self.hyper.parameters())
        return self


def test_no_gradient_by_the_hyperparameters_inside_the_inner_loop() -> None:
    plain = classifier()
    problem = _Watching(plain.model, plain.hyper, plain.splits).watch()
    joint = JointOptimizer(problem, config(inner_steps=3, start_check=False))
    joint.step()
    assert problem.seen == [False, False, False, True]
    assert all(h.requires_grad and h.grad is None for h in problem.hypers())
    joint.train_weights(2)
    assert problem.seen[4:] == [False, False]


def test_plain_training_leaves_the_hyperparameters_alone() -> None:
    problem = classifier()
    before = [h.detach().clone() for h in problem.hypers()]
    joint = JointOptimizer(problem, config())
    joint.train_weights(5)
    assert joint.inner_steps == 5
    assert joint.outer_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(problem.hypers(), before, strict=True))


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def test_batch_norm_statistics_move_with_inner_steps_only() -> None:
    problem, twin = (classifier(_batch_norm, batch_size=4) for _ in range(2))
    for hyper, other in zip(problem.hypers(), twin.hypers(), strict=True):
        assert torch.equal(hyper, other)
    joint = JointOptimizer(problem, config(inner_steps=3))
    JointOptimizer(twin, config(inner_steps=3)).train_weights(3)  # an outer step's first half
    joint.step()
    found, expected = dict(problem.model.named_buffers()), dict(twin.model.named_buffers())
    assert int(found["1.num_batches_tracked"]) == 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    joint.step()
    joint.evaluate("test")
    assert int(found["1.num_batches_tracked"]) == 6
    assert problem.model.training


def test_the_validation_loss_sees_the_preserved_statistics() -> None:
    joint = JointOptimizer(classifier(_batch_norm, batch_size=4), config(inner_steps=3))
    metrics = joint.step()
    assert metrics["val_loss"] == pytest.approx(joint.evaluate("val")["val_loss"], rel=1e-9)


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))


def _run(joint: JointOptimizer, steps: int = 3) -> list[dict[str, float]]:
    return [joint.step() for _ in range(steps)]


def test_dropout_repeats_for_a_seed() -> None:
    def run(seed: int) -> list[dict[str, float]]:
        return _run(JointOptimizer(classifier(_dropout), config(), seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_nothing_touches_the_global_random_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    problem = classifier(_dropout, batch_size=4)
    before = GlobalState(torch.device("cpu"))
    expected = draw()
    before.restore()
    joint = JointOptimizer(problem, config())
    joint.step()
    joint.train_weights(2)
    joint.evaluate("test")
    joint.load_state_dict(joint.state_dict())
    assert draw() == expected


def test_two_optimisers_in_turn_are_two_alone() -> None:
    def pair() -> tuple[JointOptimizer, JointOptimizer]:
        second = config(inverse=ConjugateGradient(max_steps=3), warm_start=True)
        return (
            JointOptimizer(classifier(_dropout, batch_size=4), config(), seed=1),
            JointOptimizer(classifier(_dropout, batch_size=5), second, seed=2),
        )

    one, two = pair()
    alone = _run(one), _run(two)
    one, two = pair()
    taken = [(one.step(), two.step()) for _ in range(3)]
    assert ([a for a, _ in taken], [b for _, b in taken]) == alone


# When it goes wrong


class _Broken(ClassificationProblem):
    """Multiplies one of its losses by a factor that a test sets."""

    train_factor = val_factor = 1.0

    def train_loss(self, batch: Batch) -> Tensor:
        return super().train_loss(batch) * self.train_factor

    def val_loss(self, batch: Batch) -> Tensor:
        return super().val_loss(batch) * self.val_factor


@pytest.mark.parametrize("factor", ["train_factor", "val_factor"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("inverse", [Neumann(terms=2), ConjugateGradient(), Nystrom(), Dense()])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_hyperparameters(
    factor: str, value: float, inverse: Inverse
) -> None:
    plain = classifier()
    problem = _Broken(plain.model, plain.hyper, plain.splits)
    joint = JointOptimizer(problem, config(inverse=inverse))
    joint.step()
    before = [h.detach().clone() for h in problem.hypers()]
    numbers = torch.get_rng_state()
    setattr(problem, factor, value)
    with pytest.raises(NonFiniteError, match="lower `inner_lr`"):
        joint.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.hypers(), before, strict=True))
    assert all(h.requires_grad for h in problem.hypers())
    assert torch.equal(numbers, torch.get_rng_state())
    assert joint.outer_steps == 1


def test_a_metric_that_is_not_finite_is_refused() -> None:
    plain = classifier()
    with torch.no_grad():
        plain.weights()[0].fill_(math.nan)
    with pytest.raises(NonFiniteError, match="test_loss is nan"):
        JointOptimizer(plain, config()).evaluate("test")


def test_a_diverging_series_leaves_the_hyperparameters_alone_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = classifier()
    joint = JointOptimizer(problem, config(inverse=Neumann(terms=5, alpha=1e4)))
    before = [h.detach().clone() for h in problem.hypers()]
    with caplog.at_level(logging.INFO, logger="ift_tune"):
        found = _run(joint, 3)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert all("λ left alone" in line and "diverged" in line for line in said)
    assert [metrics["skipped"] for metrics in found] == [1.0, 1.0, 1.0]
    assert joint.skips == 3
    assert joint.status is SolveStatus.DIVERGED
    assert joint.outer_steps == 3
    assert all(torch.equal(a, b) for a, b in zip(problem.hypers(), before, strict=True))
    assert all(math.isfinite(value) for metrics in found for value in metrics.values())


def test_skips_are_counted_in_a_row() -> None:
    class Alternating(Callback):
        def on_outer_step_begin(self, joint: JointOptimizer) -> None:
            alpha = 1e4 if joint.outer_steps in (0, 1, 3) else 0.1
            joint.config = config(inverse=Neumann(terms=5, alpha=alpha))

    joint = JointOptimizer(classifier(), config(), callbacks=[Alternating()])
    skips = []
    for _ in range(5):
        joint.step()
        skips.append(joint.skips)
    assert skips == [1, 2, 0, 1, 0]


def test_the_problem_is_checked_before_anything_is_built() -> None:
    problem = classifier()
    broken: Any = None
    problem.model = problem.hyper = broken
    with pytest.raises(UsageError, match=r"`model` must .*`hyper` must"):
        JointOptimizer(problem, config())


def test_callbacks_run_in_order_and_may_add_metrics() -> None:
    heard: list[str] = []

    class Noted(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_outer_step_begin(self, joint: JointOptimizer) -> None:
            heard.append(f"{self.name} begin {joint.inner_steps}")

        def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
            same = all(torch.equal(h, b) for h, b in zip(problem.hypers(), initial, strict=True))
            heard.append(f"{self.name} hypergradient {joint.inner_steps} {same}")

        def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
            heard.append(f"{self.name} end {joint.outer_steps}")
            metrics[self.name] = float(len(metrics))

    problem = classifier()
    initial = [h.detach().clone() for h in problem.hypers()]
    joint = JointOptimizer(problem, config(), callbacks=[Noted("a"), Noted("b")])
    metrics = joint.step()
    assert heard == [
        "a begin 0",
        "b begin 0",
        "a hypergradient 2 True",
        "b hypergradient 2 True",
        "a end 1",
        "b end 1",
    ]
    assert metrics["b"] == metrics["a"] + 1.0


# Warm starts


def test_a_warm_start_goes_on_from_the_last_solution() -> None:
    def residuals(warm: bool) -> list[float]:
        inverse = ConjugateGradient(max_steps=2, damping=0.5)
        settings = config(inverse=inverse, warm_start=warm, inner_lr=1e-6, meta_lr=1e-6)
        results: list[float] = []

        class Noted(Callback):
            def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
                assert result.stats.residual_norm is not None
                results.append(result.stats.residual_norm)

        _run(JointOptimizer(classifier(), settings, callbacks=[Noted()]), 4)
        return results

    cold, warm = residuals(False), residuals(True)
    assert warm[0] == cold[0]
    assert cold[3] == pytest.approx(cold[0], rel=1e-2)
    assert warm[3] < 0.1 * cold[3]


# Cost


def _products(inverse: Inverse, warm: bool, weights: int) -> tuple[int, int]:
    """Return the products of the first outer step and of each later one."""
    first, later = {
        Identity(): (0, 0),
        Neumann(terms=3, alpha=0.1): (3, 3),
        Neumann(terms=3): (15, 5),  # H is indefinite here
        Nystrom(rank=4): (4, 4),
        Dense(): (weights, weights),
    }[inverse]
    return first, later + int(warm)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "inverse", [Identity(), Neumann(terms=3, alpha=0.1), Neumann(terms=3), Nystrom(rank=4), Dense()]
)
def test_cost_is_counted_to_the_product(inverse: Inverse, warm: bool) -> None:
    warm = warm and inverse.refines
    settings = config(inverse=inverse, warm_start=warm, inner_steps=3)
    problem = classifier(batch_size=5)
    parts = problem.splits
    problem.splits = Splits(parts.train, parts.val, parts.search, parts.test, Batches(*rows(0)))
    joint = JointOptimizer(problem, settings)
    assert joint.cost.gradient_equivalents == 0.0
    first, later = _products(inverse, warm, sum(w.numel() for w in problem.weights()))
    expected, hvps = 0.0, 0
    for products in (first, later, later):
        metrics = joint.step()
        hvps += products
        expected += 3 + (1 + HVP * (products + 1)) * ROWS / 5 + ROWS / 5
        assert metrics["hvps"] == float(hvps)
        assert metrics["gradient_equivalents"] == pytest.approx(expected, rel=1e-12)
    joint.evaluate("test")
    assert joint.cost.gradient_equivalents == pytest.approx(expected, rel=1e-12)
    joint.evaluate("search", charge=True)
    joint.train_weights(4)
    expected += FORWARD * ROWS / 5 + 4
    assert joint.cost.gradient_equivalents == pytest.approx(expected, rel=1e-12)
    assert joint.cost.unit == 5


def test_an_evaluation_before_the_first_step_is_charged_too() -> None:
    joint = JointOptimizer(classifier(), config())
    joint.evaluate("search", charge=True)
    joint.train_weights(1)
    assert joint.cost.gradient_equivalents == pytest.approx(FORWARD + 1.0)


# Memory


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class _Box:
    """Stands for a tensor that autograd keeps, so that the kept ones can be counted."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("inner_steps", [2, 20])
def test_no_graph_outlives_its_inner_step(inner_steps: int) -> None:
    kept: weakref.WeakSet[_Box] = weakref.WeakSet()
    counts: list[int] = []

    class Counting(ClassificationProblem):
        def train_loss(self, batch: Batch) -> Tensor:
            counts.append(len(kept))
            return super().train_loss(batch)

    def pack(tensor: Tensor) -> _Box:
        box = _Box(tensor.detach())  # with its graph it would keep itself alive
        kept.add(box)
        return box

    plain = classifier()
    joint = JointOptimizer(
        Counting(plain.model, plain.hyper, plain.splits),
        config(inner_steps=inner_steps, start_check=False),
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        joint.step()
        left = len(kept)
        joint.step()
    assert counts == [0] * (2 * (inner_steps + 1))
    assert left == 0


@pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_memory_does_not_grow_over_a_hundred_outer_steps(warm: bool) -> None:
    joint = JointOptimizer(classifier(batch_size=4), config(warm_start=warm, inner_steps=1))
    _run(joint, 3)
    before = _tensors()
    _run(joint, 100)
    assert _tensors() <= before


def test_memory_does_not_grow_with_the_inner_steps() -> None:
    def left(inner_steps: int) -> int:
        joint = JointOptimizer(classifier(), config(inner_steps=inner_steps))
        before = _tensors()
        joint.step()
        return _tensors() - before

    assert left(30) == left(2)


# Problems of other shapes


class _Rows(Dataset[Any]):
    """Examples as dictionaries."""

    def __init__(self, seed: int) -> None:
        self.inputs, self.targets = rows(seed)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return {"id": f"row {index}", "x": self.inputs[index], "y": self.targets[index]}


class _Dictionaries(BilevelProblem):
    """A decayed classifier on dictionaries, with the decay inside the loss."""

    def __init__(self, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3).double()
        self.hyper = WeightDecay(self.model, "tensor", init=0.1)

        def loader(seed: int) -> DataLoader[Any]:
            return DataLoader(_Rows(seed), batch_size=batch_size, shuffle=True)

        self.splits = Splits(*(loader(seed) for seed in range(4)))

    def train_loss(self, batch: Batch) -> Tensor:
        loss: Tensor = F.cross_entropy(self.model(batch["x"]), batch["y"]) + self.hyper()
        return loss

    def val_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch["x"]), batch["y"])


def test_a_data_loader_of_dictionaries_with_a_short_last_batch() -> None:
    joint = JointOptimizer(
        _Dictionaries(batch_size=5), config(inverse=Neumann(terms=2, alpha=0.1), inner_steps=2)
    )
    sizes = [5, 5, 2] * 4  # training: two inner steps and the outer step's share one walk
    for step in range(4):
        metrics = joint.step()
        val = [5, 5, 2, 5]
        expected = sum(
            sizes[3 * s] + sizes[3 * s + 1] + (1 + HVP * 3) * sizes[3 * s + 2] + val[s]
            for s in range(step + 1)
        )
        assert metrics["gradient_equivalents"] == pytest.approx(expected / 5)
    assert "train_error" not in metrics
    assert set(joint.evaluate("test")) == {"test_loss"}


class _Spare(nn.Module):
    """A linear classifier with a weight that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs)
        return outputs


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("inverse", [Neumann(terms=2), Dense(), ConjugateGradient(), Nystrom()])
def test_a_penalty_reaches_weights_that_the_data_loss_does_not(
    inverse: Inverse, curvature: str
) -> None:
    problem = classifier(_Spare)
    spare = dict(problem.model.named_parameters())["spare"]
    joint = JointOptimizer(
        problem,
        config(inverse=inverse, curvature=curvature, inner_optimizer="sgd", inner_steps=1),
    )
    joint.step()
    torch.testing.assert_close(spare.detach(), torch.ones(2).double() * (1 - 0.01 * 2 * 0.05))
    assert joint.status is not SolveStatus.NONFINITE


class _Counted(Penalty):
    """Counts how often it is built and asked."""

    built = 0

    def __init__(self, penalty: Penalty) -> None:
        type(self).built += 1
        self._penalty, self.hypers = penalty, penalty.hypers

    def value(self, weights: Any) -> Tensor:
        raise AssertionError("the closed forms make this unnecessary")

    def add_gradient_(self, gradient: Any, weights: Any) -> None:
        self._penalty.add_gradient_(gradient, weights)

    def hvp(self, weights: Any, vector: Any) -> list[Tensor]:
        return self._penalty.hvp(weights, vector)

    def mixed(self, weights: Any, vector: Any) -> list[Tensor]:
        return self._penalty.mixed(weights, vector)


def test_a_penalty_is_built_once_for_all_inner_steps() -> None:
    class Counting(ClassificationProblem):
        def penalty(self) -> Penalty | None:
            penalty = super().penalty()
            assert penalty is not None
            return _Counted(penalty)

    plain = classifier()
    joint = JointOptimizer(
        Counting(plain.model, plain.hyper, plain.splits), config(inner_steps=25, start_check=False)
    )
    _Counted.built = 0
    joint.step()
    assert _Counted.built <= 2  # the inner loop's, and the outer step's


class _Attention(nn.Module):
    """One head of fused attention over the four inputs as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(1, 24), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v = self.embed(inputs[:, None, :, None]).chunk(3, dim=-1)
        outputs: Tensor = self.read(F.scaled_dot_product_attention(q, k, v).mean(dim=(1, 2)))
        return outputs


class _Recurrent(nn.Module):
    """A recurrent layer over the four inputs as a sequence."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layer, self.read = kind(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.layer(inputs[:, :, None])
        outputs: Tensor = self.read(hidden[:, -1])
        return outputs


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": _Attention,
    "lstm": lambda: _Recurrent(nn.LSTM),
    "gru": lambda: _Recurrent(nn.GRU),
    "batch norm": _batch_norm,
    "dropout": _dropout,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_whose_fast_kernels_have_no_second_derivative(name: str, dtype: torch.dtype) -> None:
    problem = classifier(MODELS[name], dtype=dtype)
    settings = config(inverse=ConjugateGradient(max_steps=4, damping=1.0))
    joint = JointOptimizer(problem, settings)
    before = [h.detach().clone() for h in problem.hypers()]
    found = _run(joint, 2)
    assert [metrics["skipped"] for metrics in found] == [0.0, 0.0]
    assert any(not torch.equal(a, b) for a, b in zip(problem.hypers(), before, strict=True))


class _Tuples(ClassificationProblem):
    """For models that return more than the logits."""

    def train_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch[0])[0], batch[1])

    def val_loss(self, batch: Batch) -> Tensor:
        return self.train_loss(batch)

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.val_loss(batch)}


class _Pair(nn.Linear):
    """Returns its logits and what they were computed from."""

    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs), inputs


def _tuples() -> _Tuples:
    plain = classifier(lambda: _Pair(4, 3))
    return _Tuples(plain.model, plain.hyper, plain.splits)


def test_a_model_may_return_a_tuple() -> None:
    joint = JointOptimizer(_tuples(), config())
    assert math.isfinite(joint.step()["train_loss"])


def test_gauss_newton_refuses_a_model_that_returns_a_tuple() -> None:
    with pytest.raises(UsageError, match="returns one tensor, got tuple; use curvature='hessian'"):
        JointOptimizer(_tuples(), config(curvature="gauss_newton")).step()


class _Twice(ClassificationProblem):
    """Calls the model twice, as consistency losses do."""

    def train_loss(self, batch: Batch) -> Tensor:
        return super().train_loss(batch) + super().train_loss(batch)


def test_gauss_newton_refuses_a_model_that_is_called_twice() -> None:
    plain = classifier()
    problem = _Twice(plain.model, plain.hyper, plain.splits)
    assert math.isfinite(JointOptimizer(problem, config()).step()["train_loss"])
    with pytest.raises(
        UsageError, match=r"calls the model once .* got Tensor, Tensor; use curvature='hessian'"
    ):
        JointOptimizer(problem, config(curvature="gauss_newton")).step()


def test_a_whole_split_is_measured_whatever_the_batch_size() -> None:
    problem = classifier()
    inputs, targets = rows(7)[:2]
    parts = problem.splits
    few, all_at_once = Batches(inputs, targets, batch_size=5), Batches(inputs, targets)
    problem.splits = Splits(parts.train, parts.val, few, all_at_once)
    joint = JointOptimizer(problem, config())
    measured = joint.evaluate("search")
    assert measured == joint.evaluate("search")
    assert measured["search_error"] == pytest.approx(joint.evaluate("test")["test_error"])
    assert joint.count_examples("search") == len(inputs)


def test_measuring_the_training_split_does_not_change_training() -> None:
    looked, blind = (JointOptimizer(classifier(), config()) for _ in range(2))
    looked.step()
    blind.step()
    looked.evaluate("train")
    assert looked.step() == blind.step()
