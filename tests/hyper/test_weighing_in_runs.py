"""Kinds that weigh losses, in runs: by differences, in micro-batches, against unrolled descent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ift_tune import (
    Batches,
    ClassificationProblem,
    Compose,
    DomainWeights,
    ExampleScorer,
    HyperKind,
    JointOptimizer,
    MetaConfig,
    Neumann,
    PositionWeights,
    Splits,
    WeightDecay,
)
from ift_tune.problem.micro_batches import is_additive
from ift_tune.testing.check import check_hypergradient

EXAMPLES = 24
CONFIG = MetaConfig(inverse=Neumann(terms=2, alpha=0.1), inner_steps=3, inner_lr=0.01)


def domains() -> HyperKind:
    return DomainWeights(torch.arange(EXAMPLES) % 7 % 3, floor=0.02, max_repetition=1.5)


KINDS: dict[str, Callable[[], HyperKind]] = {
    "domains": domains,
    "inputs": lambda: ExampleScorer(12, hidden=3),
    "losses": lambda: ExampleScorer(sees="loss", hidden=3),
    "features": lambda: ExampleScorer(features=torch.randn(EXAMPLES, 4), hidden=3),
    "positions": lambda: PositionWeights(4),
}


class Tagger(nn.Module):
    """Classifies each of four places by all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.first(inputs)))
        return outputs.view(-1, 3, 4)


def make(name: str) -> ClassificationProblem:
    torch.manual_seed(0)
    model, kind = Tagger(), KINDS[name]()
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    inputs, targets = torch.randn(2, EXAMPLES, 12), torch.randint(3, (2, EXAMPLES, 4))
    train = Batches(inputs[0], targets[0], torch.arange(EXAMPLES), batch_size=8)
    val = Batches(inputs[1], targets[1])
    hyper = Compose({"kind": kind, "decay": WeightDecay(model, "model", init=0.05)})
    return ClassificationProblem(model, hyper, Splits(train, val, val, val))


@pytest.mark.parametrize("name", KINDS)
def test_the_check_passes(name: str) -> None:
    report = check_hypergradient(make(name))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", KINDS)
def test_differences_are_second_derivatives(name: str) -> None:
    norms = []
    for products in ("exact", "difference"):
        joint = JointOptimizer(make(name), CONFIG.updated({"products": products}))
        norms.append([joint.step()["hypergradient_norm"] for _ in range(2)][-1])
    assert norms[1] == pytest.approx(norms[0], rel=2e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up(name: str, size: int) -> None:
    problem = make(name)
    (batch, *_) = problem.splits.train
    assert is_additive(problem, batch, problem.train_loss, size)
