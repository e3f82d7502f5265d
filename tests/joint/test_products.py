"""Runs by differences and in micro-batches: as those by second derivatives on whole batches."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    ClassificationProblem,
    DoubleBackwardError,
    ExampleWeights,
    HyperKind,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    StartCheckError,
    UsageError,
    WeightDecay,
)
from ift_tune.base.errors import UnreachableHyperparameterError
from ift_tune.joint.memory import held_bytes, size_of
from ift_tune.problem.batches import Batch

CONFIG = MetaConfig(inverse=Neumann(terms=2, alpha=0.1), inner_steps=3, inner_lr=0.01)
DIFFERENCE = CONFIG.updated({"products": "difference"})


class Once(torch.autograd.Function):
    """A tanh whose backward is a kernel without a derivative."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        outputs = inputs.tanh()
        ctx.save_for_backward(outputs)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (outputs,) = ctx.saved_tensors
        slope: Tensor = gradient * (1.0 - outputs.square())
        return slope


class OnceTanh(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = Once.apply(inputs)  # type: ignore[no-untyped-call]
        return outputs


class Checkpointed(nn.Module):
    """Runs its first layers again in the backward pass, dropout among them."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2))
        self.last, self.use_reentrant = nn.Linear(16, 3), use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(
            torch.utils.checkpoint.checkpoint(
                self.first, inputs.clone().requires_grad_(), use_reentrant=self.use_reentrant
            )
        )
        return outputs


def problem_of(
    model: nn.Module | None = None,
    hyper: HyperKind | None = None,
    kind: type[ClassificationProblem] = ClassificationProblem,
    shape: tuple[int, ...] = (6,),
) -> ClassificationProblem:
    """Return a classification of noise."""
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, *shape, generator=generator)
    targets = torch.randint(3, (64,), generator=generator)
    train = Batches(inputs[:32], targets[:32], torch.arange(32), batch_size=32)
    val = Batches(inputs[32:], targets[32:], batch_size=32)
    hyper = ExampleWeights(32) if hyper is None else hyper
    return kind(model, hyper, Splits(train, val, val, val))


def layers(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), middle, nn.Linear(16, 3))


def columns(joint: JointOptimizer, steps: int = 2) -> dict[str, float]:
    return [joint.step() for _ in range(steps)][-1]


def test_what_has_no_second_derivative_names_the_mend_and_runs_by_it() -> None:
    with pytest.raises(DoubleBackwardError, match=r'once_differentiable.*products="difference"'):
        JointOptimizer(problem_of(layers(OnceTanh())), CONFIG).step()
    found = JointOptimizer(problem_of(layers(OnceTanh())), DIFFERENCE)
    exact = JointOptimizer(problem_of(layers(nn.Tanh())), CONFIG)
    mine, theirs = columns(found), columns(exact)
    assert mine["hypergradient_norm"] == pytest.approx(theirs["hypergradient_norm"], rel=1e-3)
    assert mine["gradient_equivalents"] == theirs["gradient_equivalents"]
    check = found.start_check
    assert check is not None
    assert (check.status, check.products) == ("passed", "difference")
    assert 0.0 < check.error < 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_either_kind_run_again(use_reentrant: bool) -> None:
    found = []
    for config in (CONFIG, DIFFERENCE):
        torch.manual_seed(0)
        found.append(columns(JointOptimizer(problem_of(Checkpointed(use_reentrant)), config)))
    assert found[1]["hypergradient_norm"] == pytest.approx(found[0]["hypergradient_norm"], rel=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_either_kind_go_with_micro_batches(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    checkpointed = Checkpointed(use_reentrant)
    checkpointed.first[2] = nn.Identity()  # masks of parts are not those of the whole
    model = nn.Sequential(nn.Linear(6, 6), checkpointed)
    state = copy.deepcopy(model.state_dict())
    expected = columns(JointOptimizer(problem_of(model), CONFIG), steps=1)
    model.load_state_dict(state)
    joint = JointOptimizer(problem_of(model), CONFIG.updated({"memory_budget": "22kB"}))
    assert columns(joint, steps=1)["hypergradient_norm"] == pytest.approx(
        expected["hypergradient_norm"], rel=1e-4
    )
    assert joint.micro_batch is not None


@pytest.mark.nightly
@pytest.mark.parametrize("middle", [nn.Tanh(), nn.ReLU()])
def test_a_compiled_model_stays_compiled(middle: nn.Module) -> None:
    exact = columns(JointOptimizer(problem_of(layers(middle)), CONFIG))
    compiled = torch.compile(layers(middle), backend="aot_eager")
    found = columns(JointOptimizer(problem_of(compiled), DIFFERENCE))  # type: ignore[arg-type]
    assert found["hypergradient_norm"] == pytest.approx(exact["hypergradient_norm"], rel=0.02)


def test_a_gradient_that_is_not_the_losss_is_refused() -> None:
    model = layers(nn.Tanh())
    model[0].weight.register_hook(lambda gradient: 1.5 * gradient)  # type: ignore[index]
    with pytest.raises(StartCheckError, match="gradient of the training loss is not its"):
        JointOptimizer(problem_of(model), DIFFERENCE).step()


class Counting(ClassificationProblem):
    """A loss that is another at each call."""

    calls = 0

    def train_loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        return super().train_loss(batch) * (1.0 + 0.01 * self.calls)


class Beside(ClassificationProblem):
    """λ adds to the training loss, and no weight has a part in it."""

    def train_loss(self, batch: Batch) -> Tensor:
        beside: Tensor = self.hyper.raw.sum()  # type: ignore[operator]
        return F.cross_entropy(self.model(batch[0]), batch[1]) + beside


def test_a_loss_that_does_not_repeat_and_a_hyperparameter_beside_it_are_refused() -> None:
    with pytest.raises(StartCheckError, match="train_loss must be the same"):
        JointOptimizer(problem_of(kind=Counting), DIFFERENCE).step()
    with pytest.raises(UnreachableHyperparameterError, match="raw"):
        JointOptimizer(problem_of(kind=Beside), DIFFERENCE).step()


def test_differences_go_on_after_a_resumption_with_the_same_bits() -> None:
    config = DIFFERENCE.updated({"memory_budget": "60kB", "warm_start": True})
    torch.manual_seed(0)
    first = JointOptimizer(problem_of(), config)
    first.step()
    state = first.state_dict()
    torch.manual_seed(0)
    again = JointOptimizer(problem_of(), config)
    again.load_state_dict(state)
    assert again.micro_batch == first.micro_batch
    assert again.step() == first.step()


@pytest.mark.parametrize("products", ["exact", "difference"])
def test_a_budget_is_kept_by_micro_batches_with_the_same_numbers(products: str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ELU(), nn.Conv2d(8, 3, 3)
            )

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.layers(inputs).mean((2, 3))
            return outputs

    config = CONFIG.updated({"products": products})
    whole = JointOptimizer(problem_of(Wide(), shape=(1, 12, 12)), config)
    expected = columns(whole)
    budget = 400_000 if products == "difference" else 1_200_000
    joint = JointOptimizer(
        problem_of(Wide(), shape=(1, 12, 12)), config.updated({"memory_budget": budget})
    )
    bound = joint.max_step_cost()
    found = columns(joint, 1)
    assert found["gradient_equivalents"] <= bound
    found = columns(joint, 1)
    assert joint.micro_batch is not None
    assert 1 <= (joint.micro_batch.train or 0) < 32
    assert found["hypergradient_norm"] == pytest.approx(expected["hypergradient_norm"], rel=1e-3)
    with pytest.raises(UsageError, match=r"memory_budget is not enough .* got 1,000"):
        JointOptimizer(problem_of(), config.updated({"memory_budget": 1000})).step()


def test_a_loss_that_couples_examples_is_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ELU(), nn.Linear(64, 3))
    config = CONFIG.updated({"memory_budget": 20_000})
    with pytest.raises(UsageError, match="train_loss couples the examples of a batch"):
        JointOptimizer(problem_of(model), config).step()
    assert "train_loss is not the mean of the losses of its examples" in caplog.text


class Normalised(ClassificationProblem):
    """Divides by the sum of the weights, which begin equal: only its gradient tells."""

    def train_loss(self, batch: Batch) -> Tensor:
        weights = self.hyper.raw[batch[2]].exp()  # type: ignore[index]
        losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
        return (weights * losses).sum() / weights.sum()


def test_a_sum_of_weights_that_is_divided_by_couples_examples() -> None:
    with pytest.raises(UsageError, match="train_loss couples the examples of a batch"):
        JointOptimizer(problem_of(kind=Normalised), CONFIG.updated({"memory_budget": 1000})).step()


class Full(ClassificationProblem):
    """Runs out of memory in an outer step with more than ten examples at once."""

    largest = 10

    def train_loss(self, batch: Batch) -> Tensor:
        if self.hyper.raw.requires_grad and len(batch[0]) > self.largest:
            raise torch.OutOfMemoryError("a GPU would be full now")
        return super().train_loss(batch)


def test_memory_that_runs_out_makes_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIG.updated({"start_check": False})
    expected = columns(JointOptimizer(problem_of(), config))
    caplog.set_level(logging.WARNING)
    joint = JointOptimizer(problem_of(kind=Full), config)
    found = columns(joint)
    assert joint.micro_batch is not None
    assert joint.micro_batch.train == 8
    assert found["hypergradient_norm"] == pytest.approx(expected["hypergradient_norm"], rel=1e-4)
    assert caplog.text.count("memory ran out in an outer step") == 2
    hopeless = problem_of(kind=Full)
    assert isinstance(hopeless, Full)
    hopeless.largest = 0
    with pytest.raises(torch.OutOfMemoryError):
        JointOptimizer(hopeless, config).step()


def test_the_optimisers_states_count_before_their_first_step() -> None:
    problem = problem_of(hyper=WeightDecay(nn.Linear(1, 1)))
    problem.hyper = WeightDecay(problem.model, "weight")
    joint = JointOptimizer(problem, CONFIG.updated({"meta_optimizer": "rmsprop"}))
    weights = size_of(problem.weights())
    inner, outer = joint._inner.descent, joint._outer.descent
    # w, λ, two moments of Adam's, one of RMSprop's; and a vector for the next solve.
    assert held_bytes(problem, inner, outer) == 5 * weights
    assert held_bytes(problem, inner, outer, [w.clone() for w in problem.weights()]) == 6 * weights
    joint.step()
    assert 5 * weights <= held_bytes(problem, inner, outer) < 5 * weights + 200


@pytest.mark.parametrize(
    ("text", "number"), [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), (4096, 4096), ("8k", 8000)]
)
def test_a_budget_is_read(text: object, number: int) -> None:
    config = MetaConfig.from_flat({"memory_budget": text})
    assert config.memory_budget == number
    assert MetaConfig.from_flat(config.to_flat()) == config


@pytest.mark.parametrize("wrong", ["2 parsecs", 0, -1, True, "GB"])
def test_what_is_no_budget_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"memory_budget must be a number of bytes .* got"):
        MetaConfig(memory_budget=wrong)
    with pytest.raises(UsageError, match="products must be 'exact' or 'difference', got 'exakt'"):
        MetaConfig(products="exakt")  # type: ignore[arg-type]
    assert {"products", "memory_budget"}.isdisjoint(MetaConfig().to_flat())
