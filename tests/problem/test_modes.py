"""Contexts around an outer step leave everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ift_tune import UsageError
from ift_tune.problem.modes import (
    captured_outputs,
    evaluating,
    preserved_buffers,
    without_gradients,
)


def test_evaluating_gives_every_submodule_its_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1].eval()
    before = [m.training for m in model.modules()]
    assert len(set(before)) == 2
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == before


def test_buffers_are_put_back_even_after_an_error() -> None:
    model = nn.BatchNorm1d(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with preserved_buffers(model):
        model(torch.randn(8, 2))
        assert int(model.num_batches_tracked) == 1  # type: ignore[arg-type]
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), preserved_buffers(model):
        model(torch.randn(8, 2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class _MovingMean(nn.Module):
    """Replaces its buffer instead of writing into it, as many modules do."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(dim=0)
        return inputs - self.mean


def test_a_replaced_buffer_is_put_back_too() -> None:
    model = _MovingMean()
    with preserved_buffers(model):
        model(torch.ones(4, 2))
    assert model.mean.tolist() == [0.0, 0.0]


def test_without_gradients_makes_constants_for_a_while() -> None:
    tensors = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    with without_gradients(tensors):
        assert not (tensors[0].sum() + tensors[1].sum()).requires_grad
    assert all(t.requires_grad for t in tensors)
    with pytest.raises(ZeroDivisionError), without_gradients(tensors):
        raise ZeroDivisionError
    assert all(t.requires_grad for t in tensors)


def test_the_captured_output_is_that_of_the_call_inside() -> None:
    model = nn.Linear(2, 3)
    model(torch.ones(1, 2))
    with captured_outputs(model) as outputs:
        inside = model(torch.ones(4, 2))
    model(torch.ones(1, 2))
    assert len(outputs) == 1
    assert outputs[0] is inside


@pytest.mark.parametrize("calls", [0, 2])
def test_another_number_of_calls_than_one_is_refused(calls: int) -> None:
    model = nn.Linear(2, 3)

    def forward() -> None:
        with captured_outputs(model):
            for _ in range(calls):
                model(torch.ones(4, 2))

    with pytest.raises(UsageError, match="calls the model once"):
        forward()
