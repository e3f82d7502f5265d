"""States whose numbers have names: refused where they would be those of others."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ift_tune
from ift_tune.base.errors import CheckpointError, UsageError
from ift_tune.hyper import Compose, DomainWeights, DropoutRates, DropoutSite, HyperKind, LossMixture
from ift_tune.hyper.named_state import NamedState

MODEL = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def sources(*names: str, **bounds: Any) -> HyperKind:
    return DomainWeights(shares={name: 0.1 + 0.2 * len(name) for name in names}, **bounds)


def sites(*names: str) -> HyperKind:
    return DropoutRates(MODEL, {name: DropoutSite() for name in names})


MAKERS: list[tuple[Callable[..., HyperKind], tuple[str, ...], tuple[str, ...]]] = [
    (sources, ("web", "code"), ("web", "books")),
    (lambda *names: LossMixture(names), ("cross_entropy", "focal"), ("focal", "brier")),
    (sites, ("0", "1"), ("1", "2")),
]


def moved(kind: HyperKind) -> HyperKind:
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.add_(torch.randn_like(parameter))
    return kind


@pytest.mark.parametrize(("make", "names", "others"), MAKERS)
@pytest.mark.parametrize("composed", [False, True])
def test_a_state_of_other_names_or_another_order_is_refused(
    make: Any, names: tuple[str, ...], others: tuple[str, ...], composed: bool
) -> None:
    def build(*given: str) -> HyperKind:
        return Compose({"part": make(*given)}) if composed else make(*given)

    state = moved(build(*names)).state_dict()
    same = build(*names)
    same.load_state_dict(state)
    for name, value in same.state_dict().items():
        assert torch.equal(value, state[name])
    for wrong in (names[::-1], others):
        kind = build(*wrong)
        before = copy.deepcopy(kind.state_dict())
        with pytest.raises(UsageError, match=f"in the same order: .*{names[0]}.*got.*{wrong[0]}"):
            kind.load_state_dict(state)
        for name, value in kind.state_dict().items():
            assert torch.equal(value, before[name])  # nothing of it was taken


@pytest.mark.parametrize(
    "other", [{"floor": 0.1}, {"max_repetition": 1.7}, {"floor": 0.1, "max_repetition": 1.9}]
)
def test_a_state_of_other_bounds_is_refused(other: dict[str, float]) -> None:
    bounds: dict[str, float]
    for bounds in ({}, {"floor": 0.05}, {"max_repetition": 1.5}):
        state = moved(sources("web", "code", **bounds)).state_dict()
        with pytest.raises(UsageError, match=r"of the same (floors|caps)"):
            sources("web", "code", **other).load_state_dict(state)


def test_bounds_of_other_data_are_others_only_where_a_cap_depends_on_them() -> None:
    few, more = ["a", "b", "b"], ["a", "b", "b", "b"]
    DomainWeights(few, floor=0.1).load_state_dict(DomainWeights(more, floor=0.1).state_dict())
    with pytest.raises(UsageError, match="of the same caps"):
        DomainWeights(few, max_repetition=1.2).load_state_dict(
            DomainWeights(more, max_repetition=1.2).state_dict()
        )


@pytest.mark.parametrize(("make", "names", "_others"), MAKERS)
def test_states_of_earlier_versions_load_and_all_of_a_state_are_tensors(
    make: Any, names: tuple[str, ...], _others: Any
) -> None:
    kind = moved(Compose({"part": make(*names)}))
    state = kind.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    old = {name: value for name, value in read.items() if "extra" not in name}
    assert len(old) == len(read) - 1
    for given in (read, old):
        twin = Compose({"part": make(*names)})
        twin.load_state_dict(given)
        torch.testing.assert_close(twin.summary(), kind.summary())
    assert len(old) == len(read) - 1  # what was given stays as it was


def test_kinds_with_names_in_an_order_of_their_arguments_say_them() -> None:
    named = [kind.name for kind in ift_tune.hyper.KINDS.values() if issubclass(kind, NamedState)]
    assert named == ["domain_weights", "dropout_rates", "loss_mixture"]


def joint(order: tuple[str, ...]) -> ift_tune.JointOptimizer:
    torch.manual_seed(0)
    inputs, targets = torch.randn(12, 4), torch.randint(3, (12,))
    train = ift_tune.Batches(inputs, targets, torch.arange(12) % 2, batch_size=6)
    splits = ift_tune.Splits(train, *[ift_tune.Batches(inputs, targets)] * 3)
    model = nn.Linear(4, 3)
    problem = ift_tune.ClassificationProblem(model, sources(*order), splits)
    return ift_tune.JointOptimizer(problem, ift_tune.MetaConfig(inner_steps=2))


def test_a_run_goes_on_from_its_checkpoint_and_from_no_other_order() -> None:
    first, names = joint(("web", "code")), ("web", "code")
    first.step()
    state = copy.deepcopy(first.state_dict())
    second = joint(names)
    second.load_state_dict(state)
    first.step()
    second.step()
    for one, other in zip(first.problem.hypers(), second.problem.hypers(), strict=True):
        assert torch.equal(one, other)
    for take in ("load_state_dict", "inherit"):
        with pytest.raises(CheckpointError, match="of the same sources, in the same order"):
            getattr(joint(names[::-1]), take)(state)
