"""Models that several processes train together: refused by name; one process changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import ift_tune
from ift_tune import JointOptimizer, MetaConfig, UsageError


@contextlib.contextmanager
def processes(world_size: int) -> Iterator[None]:
    """A process group: a true one of one process, or one that makes believe."""
    if world_size == 1:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def problem_of(wrap: Callable[[nn.Module], nn.Module]) -> ift_tune.BilevelProblem:
    torch.manual_seed(0)
    inputs = torch.randn(24, 3)
    model = wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    rows = ift_tune.Batches(inputs, (inputs[:, 0] > 0).long())
    splits = ift_tune.Splits(rows, rows, rows, rows)
    return ift_tune.ClassificationProblem(model, ift_tune.WeightDecay(model, "tensor"), splits)


class Inside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = DistributedDataParallel(model)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.net(inputs)


class FSDPModule:
    """As `torch.distributed.fsdp.fully_shard` mixes into the class of a module."""


class FSDPSequential(FSDPModule, nn.Sequential):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, Inside])
def test_a_model_of_two_processes_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with processes(2):
        problem = problem_of(wrap)
        with pytest.raises(UsageError, match=r"workers=2\)\), got a model in DistributedData"):
            JointOptimizer(problem, MetaConfig())


@pytest.mark.filterwarnings("ignore")
def test_a_wrapper_kept_beside_the_model_is_refused() -> None:
    with processes(2):
        problem = problem_of(lambda model: model)
        problem.validate()
        problem.parallel = DistributedDataParallel(problem.model)  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match="DistributedDataParallel"):
            problem.validate()


def test_a_sharded_model_is_refused() -> None:
    problem = problem_of(lambda model: FSDPSequential(*model.children()))
    with pytest.raises(UsageError, match=r"give the plain model.*got a model in FSDPModule"):
        problem.validate()


@pytest.mark.filterwarnings("ignore")
def test_one_process_gets_what_the_plain_model_gets() -> None:
    with processes(1):
        plain, wrapped = (
            JointOptimizer(problem_of(wrap), MetaConfig(inner_steps=2))
            for wrap in (lambda model: model, DistributedDataParallel)
        )
        assert [plain.step() for _ in range(2)] == [wrapped.step() for _ in range(2)]
        for one, other in zip(plain.problem.hypers(), wrapped.problem.hypers(), strict=True):
            assert torch.equal(one, other)
