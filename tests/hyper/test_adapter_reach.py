"""A scale that acts nowhere is refused by its name; one that some batches come by is not."""

from __future__ import annotations

import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    AdapterScale,
    Batches,
    BilevelProblem,
    ClassificationProblem,
    Compose,
    Identity,
    JointOptimizer,
    MetaConfig,
    Splits,
    WeightDecay,
)
from ift_tune.base.errors import UnreachableHyperparameterError
from ift_tune.joint.packed import require_packable
from ift_tune.problem.in_use import idle_parts
from ift_tune.testing import check_hypergradient

DOMAINS = 3


class Attending(nn.Module):
    """Attention uses the weights of its `out_proj` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = x + self.attn(x, x, x, need_weights=False)[0]
        found: Tensor = self.head(seen.mean(dim=1))
        return found


class ByHand(nn.Module):
    """A layer's weights are used by a function, and another layer is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.linear(x.mean(dim=1), self.inner.weight, self.inner.bias)
        found: Tensor = self.head(seen.tanh())
        return found


class Ignoring(nn.Module):
    """A layer of LoRA's form that never looks at its `scaling`."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + 2.0 * self.lora_B(self.lora_A(x))
        return found


class Honest(Ignoring):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.scaling * self.lora_B(self.lora_A(x))
        return found


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Honest(), Ignoring(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.two(self.one(x)).mean(dim=1))
        return found


def splits() -> Splits:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(24, 5, 4, generator=generator)
    return Splits(*[Batches(inputs, torch.arange(24) % 3, batch_size=12)] * 4)


class OfOnesOwn(BilevelProblem):
    """The same losses, by hand."""

    def __init__(self, model: nn.Module, hyper: Compose, splits: Splits) -> None:
        self.model, self.hyper, self.splits = model, hyper, splits

    def train_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def val_loss(self, batch: Any) -> Tensor:
        return self.train_loss(batch)


CONFIG = MetaConfig(inverse=Identity(), inner_steps=2, inner_lr=0.01)
IDLE = [
    (Attending, ["attn.out_proj", "head"], ["attn.out_proj"]),
    (ByHand, ["head", "inner", "spare"], ["inner", "spare"]),
    (Lora, None, ["two"]),
]


@pytest.mark.parametrize("problem_of", [ClassificationProblem, OfOnesOwn])
@pytest.mark.parametrize(("make", "modules", "idle"), IDLE)
def test_an_idle_scale_beside_one_that_acts_is_refused(
    make: Any, modules: Any, idle: list[str], problem_of: Any
) -> None:
    torch.manual_seed(0)
    model = make()
    kind = AdapterScale(model, modules)
    hyper = Compose({"scale": kind, "decay": WeightDecay(model, "model")})
    problem = problem_of(model, hyper, splits())
    with pytest.raises(UnreachableHyperparameterError, match="No call has come by") as caught:
        JointOptimizer(problem, CONFIG).step()
    assert caught.value.names == tuple(f"the scale of {name}" for name in idle)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.names, str(again)) == (caught.value.names, str(caught.value))
    with pytest.raises(UnreachableHyperparameterError, match=f"the scale of {idle[0]}"):
        check_hypergradient(problem, directions=1)
    kept = [name for name in kind.names if name not in idle]
    hyper = Compose({"scale": AdapterScale(model, kept), "decay": WeightDecay(model, "model")})
    JointOptimizer(problem_of(model, hyper, splits()), CONFIG).step()


def test_scales_of_one_name_in_two_models_are_told_apart() -> None:
    torch.manual_seed(0)
    model = ByHand()
    kinds = {
        "idle": AdapterScale(ByHand(), "head"),  # a model that no loss calls
        "acting": AdapterScale(model, "head"),
        "decay": WeightDecay(model, "model"),
    }
    problem = ClassificationProblem(model, Compose(kinds), splits())
    problem.train_loss(next(iter(problem.splits.train)))
    assert idle_parts(problem) == ["the scale of head"]


class Branches(nn.Module):
    """An adapter for each domain; a batch is of one."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList([nn.Linear(4, 4) for _ in range(DOMAINS)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapters[int(x[0, 0, 0])]
        found: Tensor = self.head((x + adapter(x)).mean(dim=1))
        return found


def by_domain(present: int) -> Splits:
    generator = torch.Generator().manual_seed(3)
    train = []
    for domain in range(present):
        inputs = torch.randn(16, 5, 4, generator=generator)
        inputs[:, 0, 0] = domain
        train += [(inputs[first::2], torch.arange(8) % 3) for first in range(2)]
    return Splits(train, train[:1], train[:1], train[:1])


def branching(present: int) -> tuple[ClassificationProblem, AdapterScale]:
    torch.manual_seed(0)
    model = Branches()
    kind = AdapterScale(model, "adapters.?")
    hyper = Compose({"scale": kind, "decay": WeightDecay(model, "model")})
    return ClassificationProblem(model, hyper, by_domain(present)), kind


def test_what_some_batches_come_by_is_looked_for_in_the_others() -> None:
    problem, kind = branching(DOMAINS)
    problem.train_loss(next(iter(problem.splits.train)))
    assert list(kind.in_use().values()) == [True, False, False]
    joint = JointOptimizer(problem, CONFIG)
    joint.step()
    assert all(kind.in_use().values())
    problem, _ = branching(DOMAINS - 1)
    with pytest.raises(UnreachableHyperparameterError) as caught:
        JointOptimizer(problem, CONFIG).step()
    assert caught.value.names == (f"the scale of adapters.{DOMAINS - 1}",)


def test_looking_for_them_leaves_the_run_as_it_is() -> None:
    rows = []
    for known in (False, True):
        problem, kind = branching(DOMAINS)
        for site in kind.sites:
            site.reached = known
        joint = JointOptimizer(problem, CONFIG)
        metrics = [joint.step() for _ in range(2)]
        rows.append((metrics, [w.detach().clone() for w in problem.weights()]))
    assert rows[0][0] == rows[1][0]
    assert all(torch.equal(one, two) for one, two in zip(rows[0][1], rows[1][1], strict=True))


def test_copies_know_what_has_acted_and_packs_are_not_in_the_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3))
    kind = AdapterScale(model, ["1", "3"])
    problem = ClassificationProblem(
        model, Compose({"scale": kind, "decay": WeightDecay(model, "model")}), splits()
    )
    require_packable(problem, MetaConfig(inverse=Identity(), inner_steps=2, warm_start=False))
    JointOptimizer(problem, CONFIG).step()
    again: Any = pickle.loads(pickle.dumps(problem.hyper))["scale"]
    assert again.in_use() == kind.in_use() == {"the scale of 1": True, "the scale of 3": True}


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_that_is_not_active_is_idle(peft: ModuleType) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "1"]))
    kind = AdapterScale(model, adapter="other")
    model(torch.ones(1, 4))
    assert not any(kind.in_use().values())
    with model.disable_adapter():
        model(torch.ones(1, 4))
    assert not any(kind.in_use().values())
    model.set_adapter("other")
    model(torch.ones(1, 4))
    assert all(kind.in_use().values())
