"""Whatever `JointOptimizer` trains, the check accepts: both linearise by the same path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ift_tune import (
    Batches,
    ClassificationProblem,
    ConjugateGradient,
    JointOptimizer,
    MetaConfig,
    Splits,
    WeightDecay,
)
from ift_tune.testing import check_hypergradient


class Attention(nn.Module):
    """A head of fused attention over the four inputs as tokens: 21 weights."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(1, 6), nn.Linear(2, 3)
        self.checkpointed = checkpointed

    def attend(self, inputs: Tensor) -> Tensor:
        q, k, v = self.embed(inputs[:, None, :, None]).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.checkpointed:
            attended = checkpoint(self.attend, inputs, use_reentrant=False)
            assert isinstance(attended, Tensor)
        else:
            attended = self.attend(inputs)
        outputs: Tensor = self.read(attended.mean(dim=(1, 2)))
        return outputs


class Recurrent(nn.Module):
    """A recurrent layer over the four inputs as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.read = nn.GRU(1, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.layer(inputs[:, :, None])
        outputs: Tensor = self.read(hidden[:, -1])
        return outputs


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "checkpointed attention": lambda: Attention(checkpointed=True),
    "recurrent": Recurrent,
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> ClassificationProblem:
    """Return a decayed classifier of twelve examples."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)

    def rows() -> Batches:
        return Batches(torch.randn(12, 4, dtype=dtype), torch.randint(3, (12,)))

    hyper = WeightDecay(model, "tensor", init=0.05)
    return ClassificationProblem(model, hyper, Splits(rows(), rows(), rows(), rows()))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_problem_that_trains_can_be_checked(name: str) -> None:
    config = MetaConfig(inverse=ConjugateGradient(max_steps=4, damping=1.0), inner_steps=2)
    joint = JointOptimizer(make(name), config)
    assert [joint.step()["skipped"] for _ in range(2)] == [0.0, 0.0]
    report = check_hypergradient(make(name), directions=1, unrolled_steps=3)
    assert report.passed
    assert report.stationarity < 1e-8  # the attention is in float64 too
    assert len(report.comparisons) == 1 + 1 + 3
