"""Custom functions on a graph alone: which backward is cut off from what it uses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ift_tune import DoubleBackwardError, hypergradient
from ift_tune.implicit.custom_functions import refuse_cut_functions


class _Cube(torch.autograd.Function):
    """z³, whose subclasses differ in what their backward uses."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        ctx.kept = [z.detach()]
        cube: Tensor = z**3
        return cube

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        slope: Tensor = 3.0 * z**2 * gradient
        return slope


class Attribute(_Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope: Tensor = 3.0 * ctx.kept[0] ** 2 * gradient
        return slope


class Data(_Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        slope: Tensor = 3.0 * z.data**2 * gradient
        return slope


class NoGrad(_Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        with torch.no_grad():
            factor: Tensor = 3.0 * z**2
        return factor * gradient


class Intermediate(_Cube):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(3.0 * z**2)
        cube: Tensor = z**3
        return cube

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        slope: Tensor = factor * gradient
        return slope


class Scaled(torch.autograd.Function):
    """Linear, with a number that is no tensor."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2.0 * z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient


def loss_of(function: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return a loss that takes its minimum by w at a function of λ, with w and λ."""
    w = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
    hyper = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss: Tensor = function.apply(w * 1.0).square().sum() + hyper * w.square().sum()
    return loss, w, hyper


@pytest.mark.parametrize("function", [Attribute, Data, NoGrad])
def test_a_backward_that_is_cut_off_is_refused_by_name(function: Any) -> None:
    loss, w, hyper = loss_of(function)
    before = w.detach().clone()
    with pytest.raises(DoubleBackwardError, match=f"{function.__name__}.*save_for_backward"):
        hypergradient(loss, loss, [w], [hyper])
    assert torch.equal(w, before)


def test_a_saved_tensor_of_unknown_origin_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="Intermediate uses a saved tensor"):
        refuse_cut_functions(loss_of(Intermediate)[0])


@pytest.mark.parametrize("function", [_Cube, Scaled])
def test_a_right_backward_passes_and_its_graph_is_as_before(function: Any) -> None:
    loss, w, _ = loss_of(function)
    (slope,) = torch.autograd.grad(loss, w, create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_cut_functions(loss)
    (again,) = torch.autograd.grad(loss, w, create_graph=True)
    assert torch.equal(slope, again)
