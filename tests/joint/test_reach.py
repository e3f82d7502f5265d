"""Hyperparameters that a batch lacks, that act on the validation loss alone, or nowhere."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    BilevelProblem,
    Dense,
    JointOptimizer,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
    hypergradient,
)
from ift_tune.base.errors import UnreachableHyperparameterError
from ift_tune.testing import check_hypergradient

DOMAINS = 4


class Domains(BilevelProblem):
    """A weight for each domain, of which a batch of four rows holds one or two."""

    def __init__(self, used: int = DOMAINS) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2).double()
        self.strengths = nn.ParameterList(
            torch.zeros((), dtype=torch.float64) for _ in range(DOMAINS)
        )
        self.hyper = self.strengths
        inputs, targets = torch.randn(32, 3).double(), torch.randint(2, (32,))
        domains = torch.arange(32) * used // 32
        train = Batches(inputs, targets, domains, batch_size=4)
        rest = Batches(inputs, targets, domains)
        self.splits = Splits(train, rest, rest, rest)

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    def train_loss(self, batch: Any) -> Tensor:
        losses, present = self.losses(batch), batch[2].unique().tolist()
        parts = [torch.exp(self.strengths[k]) * losses[batch[2] == k].mean() for k in present]
        return torch.stack(parts).sum() + 0.1 * next(self.model.parameters()).square().sum()

    def val_loss(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()


def test_what_a_batch_lacks_has_no_gradient_there_and_the_run_goes_on() -> None:
    problem = Domains()
    lacking: list[Tensor] = []
    present: list[Tensor] = []

    class Look:
        def on_outer_step_begin(self, joint: JointOptimizer) -> None: ...
        def on_hypergradient(self, joint: JointOptimizer, result: Any) -> None:
            for grad in result.grads:
                (lacking if float(grad) == 0.0 else present).append(grad)

        def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None: ...

    config = MetaConfig(inverse=Dense(damping=0.1), inner_steps=1)
    joint = JointOptimizer(problem, config, callbacks=[Look()])
    for _ in range(20):
        joint.step()
    assert lacking
    assert present


def test_what_no_batch_has_is_refused_at_once_by_its_name() -> None:
    joint = JointOptimizer(Domains(used=DOMAINS - 1), MetaConfig(inner_steps=1))
    with pytest.raises(UnreachableHyperparameterError, match=r"^3: the gradient") as caught:
        joint.step()
    assert caught.value.names == ("3",)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.names, str(again)) == (caught.value.names, str(caught.value))


def test_looking_for_it_moves_no_random_number() -> None:
    rows = []
    for used in (DOMAINS, 1):
        problem = Domains(used)
        if used == 1:  # all in every batch
            problem.train_loss = lambda batch, p=problem: (  # type: ignore[method-assign, misc]
                torch.stack([h.exp() for h in p.hyper]).mean() * p.losses(batch).mean()
            )
        joint = JointOptimizer(problem, MetaConfig(inner_steps=1))
        joint.step()
        with joint._random.active():
            rows.append(float(torch.rand(())))
    assert rows[0] == rows[1]


def test_a_hyperparameter_of_the_validation_loss_alone_has_its_direct_gradient() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 5).double(), torch.randint(3, (40,))
    model = nn.Linear(5, 3).double()
    decay, temperature = (torch.zeros((), dtype=torch.float64).requires_grad_() for _ in "ab")
    train = F.cross_entropy(model(inputs), targets) + decay.exp() * model.weight.square().sum()
    val = F.cross_entropy(model(inputs) * temperature.exp(), targets)
    hypers = {"decay": decay, "temperature": temperature}
    result = hypergradient(train, val, model, hypers, inverse=Dense(damping=0.1))
    (direct,) = torch.autograd.grad(val, temperature, retain_graph=True)
    torch.testing.assert_close(result.grads[1], direct)
    unused = torch.zeros(()).requires_grad_()
    with pytest.raises(UnreachableHyperparameterError, match="unused"):
        hypergradient(train, val, model, hypers | {"unused": unused})


class Physics(BilevelProblem):
    """u′ = −u by its residual at random points: losses that differentiate by their inputs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        self.hyper = WeightDecay(self.model, "tensor", init=0.1)
        points = [torch.rand(12, 1)]
        self.splits = Splits(points, points, points, points)

    def train_loss(self, batch: Any) -> Tensor:
        points = batch.clone().requires_grad_()
        u = self.model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        start = self.model(torch.zeros(1, 1, dtype=points.dtype))
        loss: Tensor = (slope + u).square().mean() + (start - 1.0).square().sum()
        return loss

    val_loss = train_loss

    def penalty(self) -> Any:
        assert isinstance(self.hyper, WeightDecay)
        return self.hyper.penalty()


def test_losses_that_differentiate_by_inputs_are_stepped_measured_and_checked() -> None:
    joint = JointOptimizer(Physics(), MetaConfig(inner_steps=3))
    joint.step()
    (batch,) = joint.problem.splits.search
    expected = float(joint.problem.val_loss(batch).detach())
    assert joint.evaluate("search") == {"search_loss": pytest.approx(expected)}
    assert check_hypergradient(Physics(), directions=1, unrolled_steps=2).passed


class Stream:
    """Repeats a batch for ever; says how many it wants to be asked for, or not."""

    def __init__(self, length: int | None) -> None:
        self.length = length

    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(2, 3).double(), torch.zeros(2).long(), torch.zeros(2).long()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream")
        return self.length


def test_an_endless_split_is_left_at_its_length_or_refused() -> None:
    problem = Domains()
    rest = problem.splits.val
    problem.splits = Splits(problem.splits.train, rest, Stream(3), Stream(None))
    joint = JointOptimizer(problem, MetaConfig(inner_steps=1))
    joint.evaluate("search")
    assert joint.count_examples("search") == 6
    with pytest.raises(UsageError, match=r"must end, got 10,000 batches .* give it a __len__"):
        joint.evaluate("test")
