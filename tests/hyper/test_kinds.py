"""The laws of the family, on every kind in `KINDS`: a new one is covered the day it is added."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.hyper import KINDS, Compose, HyperKind, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.hypergradient import hypergradient
from ift_tune.implicit.inverse import Dense
from ift_tune.implicit.vectors import flatten
from ift_tune.problem.batches import Batch
from ift_tune.problem.problem import Splits
from ift_tune.testing import check_hypergradient

EXAMPLES = 9
NAMES = sorted(KINDS)
PAIRS = list(itertools.permutations(NAMES, 2))
UNORDERED = list(itertools.combinations(NAMES, 2))


def make_net(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def moved(kind: HyperKind, seed: int = 1) -> HyperKind:
    """The kind with its λ away from the uniform start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for raw in kind.parameters():
            raw.add_(0.4 * torch.randn(raw.shape, generator=generator, dtype=torch.float64))
    return kind


def example(name: str, net: nn.Module) -> HyperKind:
    return KINDS[name].example(net, make_batch(2)[0])


def make_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = 1.5 * torch.randn(EXAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(EXAMPLES) % 3, torch.arange(EXAMPLES)


class StillProblem(ClassificationProblem):
    """A kind that draws random numbers draws the same in every training loss."""

    def train_loss(self, batch: Batch) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return super().train_loss(batch)


def make_problem(kind: HyperKind, net: nn.Module) -> ClassificationProblem:
    train, val = [make_batch(2)], [make_batch(3)]
    return StillProblem(net, kind, Splits(train, val, val, val))


def with_decay(name: str, net: nn.Module) -> HyperKind:
    """The kind, beside a decay, without which the inner problem may have no minimum."""
    kind = moved(example(name, net))
    if name == WeightDecay.name:
        return kind
    return Compose({"kind": kind, "decay": WeightDecay(net, "model", init=0.03)})


@pytest.mark.parametrize("name", NAMES)
def test_hypergradient_is_right(name: str) -> None:
    net = make_net()
    report = check_hypergradient(
        make_problem(with_decay(name, net), net), directions=1, unrolled_steps=3
    )
    assert report.passed
    assert report.stationarity < 1e-8


@pytest.mark.parametrize(("first", "second"), UNORDERED)
def test_composition_with_each_other_kind_is_right(first: str, second: str) -> None:
    net = make_net()
    both = Compose({name: moved(example(name, net)) for name in (first, second)})
    if WeightDecay.name not in (first, second):
        both = Compose({"both": both, "decay": WeightDecay(net, "model", init=0.03)})
    report = check_hypergradient(make_problem(both, net), directions=1, unrolled_steps=3)
    assert report.passed
    assert report.hypers == both.count


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_parts_of_a_composition_have_the_gradients_in_its_order(first: str, second: str) -> None:
    net = make_net()
    parts = {name: moved(example(name, net)) for name in (first, second)}
    both = Compose(parts)
    problem = make_problem(both, net)
    whole = hypergradient(
        problem.train_loss(make_batch(2)),
        problem.val_loss(make_batch(3)),
        net,
        both,
        inverse=Dense(damping=1.0),
        penalty=problem.penalty(),
    ).grads
    start = 0
    for part in parts.values():
        alone = hypergradient(
            problem.train_loss(make_batch(2)),
            problem.val_loss(make_batch(3)),
            net,
            part,
            inverse=Dense(damping=1.0),
            penalty=problem.penalty(),
        ).grads
        mine = whole[start : start + len(alone)]
        for one, other in zip(mine, alone, strict=True):  # kernels may sum in another order
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        start += len(alone)
    assert start == len(whole)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_registered_small_and_free_of_the_weights(name: str) -> None:
    net = make_net()
    kind = example(name, net)
    assert isinstance(kind, KINDS[name])
    assert kind.name == name
    hypers = list(kind.parameters())
    assert kind.count == sum(h.numel() for h in hypers) > 0
    assert not {id(h) for h in hypers} & {id(w) for w in net.parameters()}
    assert all(h.dtype == torch.float64 and h.requires_grad for h in hypers)
    make_problem(kind, net).validate()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_makes_the_round_trip(name: str) -> None:
    net = make_net()
    kind, other = moved(example(name, net)), example(name, net)
    assert other.summary() != kind.summary()
    other.load_state_dict(copy.deepcopy(kind.state_dict()))
    assert torch.equal(flatten(list(other.parameters())), flatten(list(kind.parameters())))
    assert other.summary() == kind.summary()
    batch = make_batch(2)
    losses = [
        float(p.train_loss(batch).detach())
        + (0.0 if (r := p.penalty()) is None else float(_value(r, net)))
        for p in (make_problem(k, net) for k in (kind, other))
    ]
    assert losses[0] == losses[1]


def _value(penalty: object, net: nn.Module) -> Tensor:
    value: Tensor = penalty.value(list(net.parameters()))  # type: ignore[attr-defined]
    return value.detach()


@pytest.mark.parametrize("name", NAMES)
def test_deep_copies_are_independent_and_follow_the_copied_model(name: str) -> None:
    net = make_net()
    problem = make_problem(moved(example(name, net)), net)
    twin = copy.deepcopy(problem)
    before = flatten(problem.hypers()).detach().clone()
    with torch.no_grad():
        for tensor in [*twin.weights(), *twin.hypers()]:
            tensor.add_(1.0)
    assert torch.equal(flatten(problem.hypers()), before)
    twin.validate()


@pytest.mark.parametrize("name", NAMES)
def test_summary_is_a_few_finite_named_numbers(name: str) -> None:
    summary = example(name, make_net()).summary()
    assert 0 < len(summary) <= 20
    assert all(isinstance(v, float) and math.isfinite(v) for v in summary.values())


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_examples_keep_the_shape_of_the_losses(name: str) -> None:
    kind = example(name, make_net())
    losses = torch.rand(4, dtype=torch.float64)
    weighed = kind.weigh(losses, torch.tensor([0, 3, 3, 8]))
    assert (weighed.shape, weighed.dtype) == (losses.shape, losses.dtype)


def test_composition_collects_summaries_and_parts_by_name() -> None:
    net = make_net()
    parts = {f"my_{name}": example(name, net) for name in NAMES}
    both = Compose(parts)
    assert both.count == sum(part.count for part in parts.values())
    assert both.summary() == {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.summary().items()
    }
    assert all(both[name] is part for name, part in parts.items())


def test_composition_without_penalties_has_none() -> None:
    net = make_net()
    without = [n for n in NAMES if example(n, net).penalty() is None]
    assert without
    assert Compose({n: example(n, net) for n in without}).penalty() is None


def test_composition_weighs_one_after_the_other() -> None:
    net = make_net()
    kind = moved(example("example_weights", net))
    losses, index = torch.rand(4, dtype=torch.float64), torch.tensor([1, 0, 8, 2])
    twice = Compose({"a": kind, "b": kind}).weigh(losses, index)
    torch.testing.assert_close(twice, kind.weigh(kind.weigh(losses, index), index))


@pytest.mark.parametrize("parts", [{}, {"decay": nn.Linear(1, 1)}])
def test_composition_of_anything_else_is_refused(parts: dict[str, HyperKind]) -> None:
    with pytest.raises(UsageError, match="names to hyperparameter kinds"):
        Compose(parts)
    with pytest.raises(UsageError, match="take their examples"):
        Compose.example(nn.Linear(1, 1), torch.ones(1, 1))
