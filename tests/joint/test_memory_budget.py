"""A memory budget is kept by every outer step, and not by the first alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from ift_tune import (
    Batches,
    ClassificationProblem,
    JointOptimizer,
    MetaConfig,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.joint.live_bytes import LiveBytes
from ift_tune.problem.micro_batches import MicroBatch

WIDTH, BATCH, SIDE = 16, 16, 8
# Bytes of the data in memory, which no budget counts; a batch of it is counted.
DATA = 2 * BATCH * (2 * SIDE**2 * 4 + 8)
CASES: dict[str, dict[str, Any]] = {
    "a series with a given alpha": {"terms": 3, "alpha": 0.1},
    "that by differences": {"terms": 3, "alpha": 0.1, "products": "difference"},
    "a series from the last solution": {"terms": 3, "warm_start": True},
    "a series with a signal": {"terms": 1, "signal_every": 2, "signal_parts": 2},
    "conjugate gradient by differences": {
        "inverse": "conjugate_gradient",
        "max_steps": 2,
        "warm_start": True,
        "products": "difference",
    },
    "identity": {"inverse": "identity"},
}


def begin(norm: str, changes: dict[str, Any], budget: int | None = None) -> JointOptimizer:
    """Return a small net of convolutions with a decay for each weight."""
    torch.manual_seed(0)
    normal = (lambda: nn.GroupNorm(4, WIDTH)) if norm == "group" else lambda: nn.BatchNorm2d(WIDTH)
    model = nn.Sequential(
        *(nn.Conv2d(2, WIDTH, 3, bias=False), normal(), nn.ReLU()),
        *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), normal(), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(WIDTH * (SIDE - 2) ** 2, 3)),
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * BATCH, 2, SIDE, SIDE, generator=generator)
    targets = torch.randint(3, (2 * BATCH,), generator=generator)
    train, val = (
        Batches(inputs[i : i + BATCH], targets[i : i + BATCH], batch_size=BATCH) for i in (0, BATCH)
    )
    config = MetaConfig(
        inner_steps=1, inner_lr=1e-3, meta_optimizer="rmsprop", memory_budget=budget
    ).updated({"start_check": False, **changes})
    problem = ClassificationProblem(
        model, WeightDecay(model, per="weight"), Splits(train, val, val, val)
    )
    return JointOptimizer(problem, config)


def peaks(
    norm: str, changes: dict[str, Any], budget: int | None, steps: int
) -> tuple[list[int], float, MicroBatch | None]:
    """Return the peak of each step, all tensors counted, the last hypergradient, and the parts."""
    found = []
    with LiveBytes() as live:
        joint = begin(norm, changes, budget)
        for _ in range(steps):
            gc.collect()
            live.peak = live.now
            row = joint.step()
            found.append(live.peak)
    return found, row["hypergradient_norm"], joint.micro_batch


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_every_outer_step_keeps_to_the_budget(name: str) -> None:
    free, length, _ = peaks("group", CASES[name], None, 4)
    budget = int(0.92 * max(free))
    found, other, parts = peaks("group", CASES[name], budget, 4)
    assert parts is not None
    assert max(found[1:]) <= budget + DATA  # the first measures what is too much, too
    assert other == pytest.approx(length, rel=0.02)


@pytest.mark.parametrize("norm", ["group", pytest.param("batch", marks=pytest.mark.nightly)])
def test_whole_batches_are_taken_where_there_is_room(norm: str) -> None:
    changes = CASES["a series with a given alpha"]
    free, *_ = peaks(norm, changes, None, 2)
    budget = int(1.02 * max(free)) + DATA
    found, _, parts = peaks(norm, changes, budget, 3)
    assert parts is None
    assert max(found) <= budget


def test_a_step_beyond_the_budget_is_noticed_and_those_to_come_are_cut_finer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = CASES["a series with a given alpha"]
    free, length, _ = peaks("group", changes, None, 3)
    budget = int(0.92 * max(free))
    with LiveBytes() as live:
        joint = begin("group", changes, budget)
        state = joint.state_dict()
        state["micro_batch"] = [True, None]  # as of a run that has found whole batches to fit
        joint.load_state_dict(state)
        for _ in range(2):
            joint.step()
        assert "more than memory_budget: those to come" in caplog.text
        assert joint.micro_batch == MicroBatch(BATCH // 2, BATCH // 2)
        gc.collect()
        live.peak = live.now
        row = joint.step()
    assert live.peak <= budget + DATA
    assert row["hypergradient_norm"] == pytest.approx(length, rel=0.02)
    again = begin("group", changes, budget)
    again.load_state_dict(joint.state_dict())
    assert again.micro_batch == joint.micro_batch
    assert again.state_dict()["micro_batch"] == joint.state_dict()["micro_batch"]
    assert again.step() == joint.step()


def test_batches_that_cannot_be_cut_are_refused_or_have_room() -> None:
    changes = CASES["a series with a given alpha"]
    free, *_ = peaks("batch", changes, None, 2)
    with pytest.raises(UsageError, match="couples the examples of a batch"):
        peaks("batch", changes, int(0.7 * max(free)), 1)
