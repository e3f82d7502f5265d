"""Second derivatives that would be wrong in silence are refused; those that are right are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ift_tune import DoubleBackwardError, hypergradient, safe_kernels
from ift_tune.implicit.hidden_curvature import refuse_hidden_curvature


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3.0 * x**2 * gradient


class _Attribute(_Cube):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 3.0 * ctx.x**2 * gradient


class _Data(_Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3.0 * x.data**2 * gradient


class _WithoutGraph(_Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 3.0 * x**2 * gradient


class _Intermediate(_Cube):
    """Keeps what it computed on the way: neither an input nor an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (square,) = ctx.saved_tensors
        return 3.0 * square * gradient


class _Output(_Cube):
    """The exponential: its output is all that the backward needs, and has a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return y * gradient


class _Reversal(_Cube):
    """Linear: nothing is kept, and nothing is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.scale = -0.5
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.scale * gradient


class _Product(torch.autograd.Function):
    """Two inputs, and a second output without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x @ w, x.argmax(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        x, w = ctx.saved_tensors
        return gradient @ w.T, x.T @ gradient


def _loss(function: type[torch.autograd.Function], weight: Tensor) -> Tensor:
    hidden = torch.tanh(2.0 * weight)
    inputs = (hidden, weight) if function is _Product else (hidden,)
    found = function.apply(*inputs)  # type: ignore[no-untyped-call]
    outputs: Tensor = found[0] if isinstance(found, tuple) else found
    return outputs.square().sum()


@pytest.mark.parametrize("function", [_Attribute, _Data, _WithoutGraph, _Intermediate])
def test_a_backward_that_is_cut_off_from_its_inputs_is_refused(function: type[_Cube]) -> None:
    weight = torch.linspace(0.1, 0.9, 9).reshape(3, 3).requires_grad_()
    hyper = torch.ones((), requires_grad=True)
    loss = _loss(function, weight)
    with pytest.raises(DoubleBackwardError, match=rf"{function.__name__}, whose backward keeps"):
        hypergradient(hyper * loss, loss, [weight], [hyper])


@pytest.mark.parametrize("function", [_Cube, _Output, _Reversal, _Product])
def test_others_are_not_and_their_graphs_stay_usable(
    function: type[torch.autograd.Function],
) -> None:
    weight = torch.linspace(0.1, 0.9, 9).reshape(3, 3).requires_grad_()
    loss = _loss(function, weight)
    refuse_hidden_curvature(loss)
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    torch.autograd.grad(slope.sum(), weight)
    assert weight.grad is None


def test_weight_norms_kernel_is_refused_by_name_and_mended_by_safe_kernels() -> None:
    torch.manual_seed(0)
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    hyper = torch.ones((), requires_grad=True)

    def loss() -> Tensor:
        outputs: Tensor = model(torch.ones(1, 3))
        return hyper * outputs.square().sum()

    with pytest.raises(DoubleBackwardError, match=r"weight_norm's kernel.*safe_kernels"):
        hypergradient(loss(), loss(), model, [hyper])
    with safe_kernels(model):
        inside = loss()
    assert hypergradient(inside, inside, model, [hyper]).usable


@pytest.mark.parametrize("form", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_a_power_iteration_is_refused_until_it_is_held(form: Any) -> None:
    model = nn.Sequential(nn.Tanh(), form(nn.Linear(3, 2)))
    hyper = torch.ones((), requires_grad=True)
    for held in (False, True):
        if held:
            model[1].eval()
        loss = hyper * model(torch.ones(1, 3)).square().sum()
        if held:
            assert hypergradient(loss, loss, model, [hyper]).usable
        else:
            with pytest.raises(DoubleBackwardError, match=r"spectral_norm.*get_submodule\('1"):
                hypergradient(loss, loss, model, [hyper])


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh()])
def test_a_checkpoint_that_may_run_again_in_another_mode_is_refused(middle: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2))
    hyper = torch.ones((), requires_grad=True)
    inputs = torch.randn(5, 3)

    def loss(training: bool) -> Tensor:
        outputs: Tensor = checkpoint(model.train(training), inputs, use_reentrant=False)
        return hyper * outputs.square().sum()

    def losses() -> tuple[Tensor, Tensor]:
        train, val = loss(True), loss(False)
        model.train()
        return train, val

    if isinstance(middle, nn.Tanh):
        assert hypergradient(*losses(), model, [hyper]).usable
    else:
        with pytest.raises(DoubleBackwardError, match="1 depends on the mode"):
            hypergradient(*losses(), model, [hyper])
    with safe_kernels(model):
        inside = losses()
    found = hypergradient(*inside, model, [hyper])
    model.eval()
    again = hypergradient(*inside, model, [hyper])  # nothing is run again, so no mode matters
    assert torch.equal(found.grads[0], again.grads[0])


def test_compiled_models_run_eagerly_in_the_outer_step() -> None:
    pytest.importorskip("torch._dynamo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    hyper = torch.ones((), requires_grad=True)
    with safe_kernels(model):
        losses = [hyper * m(torch.ones(1, 3)).square().sum() for m in (model, compiled)]
    found = [hypergradient(loss, loss, model, [hyper]).grads[0] for loss in losses]
    assert torch.equal(*found)


class MaskedReLU(torch.autograd.Function):
    """A ReLU that keeps a mask of real numbers, as many hand-written ones do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = (x > 0).to(x)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grad * mask


def test_a_function_that_is_linear_piece_by_piece_is_not_taken_for_a_curved_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs, vector = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    products = []
    for relu in (MaskedReLU.apply, torch.relu):
        loss = relu(inputs @ weight.T).square().sum()
        refuse_hidden_curvature(loss)
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        products.append(torch.autograd.grad(slope, weight, vector)[0])
    torch.testing.assert_close(*products)
