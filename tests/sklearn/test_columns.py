"""The columns of a table are found where a model takes them in, whatever its layers are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ift_tune.sklearn.columns import weights_of_columns

COLUMNS = 4
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Square layers, in an order of their own."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, COLUMNS)
        self.norm, self.drop = nn.BatchNorm1d(COLUMNS), nn.Dropout(0.5)
        self.called = forward

    def forward(self, rows: Tensor) -> Tensor:
        return self.called(self, rows)


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda net, x: net.last(net.first(x).relu()), ["first"]),
        (lambda net, x: net.last(net.first(net.drop(net.norm(x))).relu()), ["first"]),
        (lambda net, x: net.last(net.first(input=3.0 * x - 1.0).relu()), ["first"]),
        (lambda net, x: net.last(x) + net.first(x).relu(), ["last", "first"]),
        (lambda net, x: net.last(x.flip(1) + x), []),
        (lambda net, x: net.last(x @ torch.ones(COLUMNS, COLUMNS)), []),
        (lambda net, x: x, []),
    ],
    ids=["reversed", "normalised", "scaled", "wide and deep", "mixed", "summed", "unused"],
)
def test_the_weights_that_columns_enter(forward: Forward, found: list[str]) -> None:
    torch.manual_seed(0)
    net = Net(forward)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    inputs = torch.randn(9, COLUMNS)
    state = torch.get_rng_state()
    assert weights_of_columns(net, inputs) == [f"{name}.weight" for name in found]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.drop.training
    assert not net.first._forward_pre_hooks


def test_a_convolution_over_columns_as_channels() -> None:
    net = nn.Sequential(nn.Unflatten(1, (COLUMNS, 1)), nn.Conv1d(COLUMNS, 2, 1), nn.Flatten())
    assert weights_of_columns(net, torch.randn(9, COLUMNS)) == ["1.weight"]
