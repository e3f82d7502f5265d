"""Weights of positions against PyTorch's losses, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ift_tune
from ift_tune.base.errors import UsageError
from ift_tune.base.views import HeatMap
from ift_tune.hyper import PositionWeights
from ift_tune.testing.contracts import check_kind


def moved(*shape: int, **arguments: Any) -> PositionWeights:
    kind = PositionWeights(*shape, like=torch.empty(0, dtype=torch.float64), **arguments)
    torch.manual_seed(0)
    nn.init.normal_(kind.raw)
    return kind


@pytest.mark.parametrize("transform", ["softplus", "exp"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_each_loss_is_multiplied_by_the_weight_of_its_place(
    transform: str, shape: tuple[int, ...]
) -> None:
    kind = moved(*shape, transform=transform)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, *shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (4, *shape), generator=generator)
    each = F.cross_entropy(logits, targets, reduction="none")
    found = kind.criterion(lambda a, b: F.cross_entropy(a, b, reduction="none"))(logits, targets)
    weights = F.softplus(kind.raw) if transform == "softplus" else kind.raw.exp()
    torch.testing.assert_close(found, each * weights)


def test_padding_counts_for_nothing_whatever_its_weight() -> None:
    kind = moved(3)
    model = nn.Conv1d(2, 4, 1).double()
    inputs = torch.randn(5, 2, 3, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, -100, -100], [1, 1, -100], [0, 0, 0], [2, -100, 3]])
    splits = ift_tune.Splits(*[ift_tune.Batches(inputs, targets)] * 4)
    problem = ift_tune.ClassificationProblem(model, kind, splits)
    each = F.cross_entropy(model(inputs), targets, reduction="none")
    expected = (each * kind()).sum() / (targets != -100).sum()
    torch.testing.assert_close(problem.train_loss((inputs, targets)), expected)


def test_kind_keeps_the_laws_on_sequences() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.last(torch.tanh(self.first(inputs)))
            return outputs.movedim(-1, 1)

    torch.manual_seed(0)
    batch = torch.randn(7, 4, 2), torch.randint(3, (7, 4))
    check_kind(PositionWeights(4), model=Tagger(), batch=batch)


def test_losses_of_another_shape_are_refused() -> None:
    made = PositionWeights(4).criterion(lambda a, b: F.cross_entropy(a, b, reduction="none"))
    with pytest.raises(UsageError, match=r"\('B', 4\), got \(2, 5\).*PositionWeights\(5,\)"):
        made(torch.zeros(2, 3, 5), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(UsageError, match=r"got \(2,\)"):
        made(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("shape", "arguments", "text"),
    [
        ((0,), {}, "at least 1"),
        ((2.0,), {}, "integer of at least 1"),
        ((True,), {}, "integer of at least 1"),
        ((2,), {"init": 0.0}, "a weight above 0, got 0"),
        ((2,), {"transform": "sigmoid"}, "unknown transform"),
    ],
)
def test_nonsense_is_refused(shape: Any, arguments: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        PositionWeights(*shape, **arguments)


def test_many_positions_are_a_picture() -> None:
    assert PositionWeights(2).summary() == pytest.approx({"position_0": 1.0, "position_1": 1.0})
    many = PositionWeights(64)
    (view,) = many.views()
    assert isinstance(view, HeatMap)
    assert set(many.summary()) == {"min", "median", "mean", "max"}
    assert many.coarse_space() == {}


def test_a_shape_is_taken_as_one_argument_too() -> None:
    assert PositionWeights((2, 3)).raw.shape == PositionWeights(2, 3).raw.shape == (2, 3)
