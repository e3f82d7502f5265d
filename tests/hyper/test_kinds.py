"""Every kind in `KINDS` keeps the laws of the family, alone and composed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.hyper import KINDS, Compose, HyperKind
from ift_tune.testing.contracts import check_kind

EXAMPLES = 9
NAMES = sorted(KINDS)
HOOKS = ("inputs", "applied", "criterion", "weigh", "penalty")


def hooks(name: str) -> set[str]:
    return {hook for hook in HOOKS if getattr(KINDS[name], hook) is not getattr(HyperKind, hook)}


# Kinds meet where they act at the same place; beside that each kind has one neighbour.
ALL = list(itertools.permutations(NAMES, 2))
MEETING = [pair for pair in itertools.combinations(NAMES, 2) if hooks(pair[0]) & hooks(pair[1])]
NEIGHBOURS = list(itertools.pairwise(NAMES))
PAIRS = list(dict.fromkeys([*MEETING, *NEIGHBOURS]))


def make_net(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = 1.5 * torch.randn(EXAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(EXAMPLES) % 3, torch.arange(EXAMPLES)


def example(name: str, net: nn.Module) -> HyperKind:
    torch.manual_seed(0)  # of a kind that draws its λ
    return KINDS[name].example(net, make_batch()[0])


def check_composition(*names: str) -> None:
    net = make_net()
    both = Compose({name: example(name, net) for name in names})
    check_kind(both, model=net, batch=make_batch())


@pytest.mark.parametrize("name", NAMES)
def test_kind_keeps_the_laws(name: str) -> None:
    assert KINDS[name].name == name
    assert isinstance(example(name, make_net()), KINDS[name])
    check_kind(KINDS[name])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair_keeps_the_laws(pair: tuple[str, str]) -> None:
    check_composition(*pair)


def test_all_kinds_together_keep_the_laws() -> None:
    check_composition(*NAMES)


@pytest.mark.nightly
@pytest.mark.parametrize("pair", [pair for pair in ALL if pair not in PAIRS], ids="-".join)
def test_any_other_pair_and_order_keeps_the_laws(pair: tuple[str, str]) -> None:
    check_composition(*pair)


def test_pairs_that_are_always_tested_are_those_that_meet() -> None:
    assert ("class_weights", "loss_mixture") in MEETING  # both make a criterion
    assert ("affine_color", "distilled_data") in MEETING  # both change the inputs
    assert ("l1_decay", "weight_decay") in MEETING  # both are penalties
    assert ("dropout_rates", "weight_decay") not in MEETING
    assert {name for pair in PAIRS for name in pair} == set(NAMES)


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
    kind = example("example_weights", make_net())
    with torch.no_grad():
        next(kind.parameters()).copy_(torch.arange(EXAMPLES))
    losses, index = torch.rand(4, dtype=torch.float64), torch.tensor([1, 0, 8, 2])
    twice = Compose({"a": kind, "b": copy.deepcopy(kind)}).weigh(losses, index)
    torch.testing.assert_close(twice, kind.weigh(kind.weigh(losses, index), index))


@pytest.mark.parametrize("parts", [{}, {"decay": nn.Linear(1, 1)}])
def test_composition_of_anything_else_is_refused(parts: dict[str, HyperKind]) -> None:
    with pytest.raises(UsageError, match=r"Compose must have a (mapping|kind) .*, got"):
        Compose(parts)
    with pytest.raises(UsageError, match="take their examples"):
        Compose.example(nn.Linear(1, 1), torch.ones(1, 1))
