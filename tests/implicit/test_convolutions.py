"""Convolutions with second derivatives of their own: the numbers are those of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ift_tune import safe_kernels
from ift_tune.implicit.convolutions import CONVOLUTIONS
from ift_tune.implicit.hidden_curvature import graph_nodes, refuse_hidden_curvature

PLAIN = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
Call = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def is_own(found: Tensor) -> bool:
    """Return whether a result has the second derivatives of this package."""
    return any("_Convolution" in node.name() for node in graph_nodes(found))


def derivatives(call: Call, x: Tensor, w: Tensor, b: Tensor | None, orders: int) -> list[Tensor]:
    """Return a result and its first derivatives along random vectors, by all that it is made of."""
    generator = torch.Generator().manual_seed(0)
    inputs = [t for t in (x, w, b) if t is not None and t.requires_grad]
    found = call(x, w, b)
    every = [found]
    # The square makes the first derivative curved by a bias as well.
    slope = found.square().sum()
    for _ in range(orders):
        grads = torch.autograd.grad(slope, inputs, create_graph=True)
        every += grads
        vectors = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in grads]
        slope = torch.stack([(g * v).sum() for g, v in zip(grads, vectors, strict=True)]).sum()
    return every


def agree(call: Call, x: Tensor, w: Tensor, b: Tensor | None, orders: int = 3) -> None:
    truth = derivatives(call, x, w, b, orders)
    with safe_kernels():
        own = derivatives(call, x, w, b, orders)
    for a, e in zip(own, truth, strict=True):
        assert a.dtype == e.dtype
        assert (a - e).norm() <= 1e-10 * (1 + e.norm())


@st.composite
def shapes(draw: Any) -> dict[str, Any]:
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 3), min_size=n, max_size=n)
    kernel, stride, dilation = draw(sizes), draw(sizes), draw(sizes)
    return {
        "n": n,
        "groups": groups,
        "kernel": kernel,
        "stride": draw(st.sampled_from([stride, stride[:1], stride[0]])),
        "dilation": dilation,
        "padding": draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)),
        # An output padding has to be less than the stride or the dilation.
        "more": [draw(st.integers(0, d - 1)) for d in dilation],
        "side": [
            d * (k - 1) + 1 + draw(st.integers(0, 2)) for d, k in zip(dilation, kernel, strict=True)
        ],
        "channels": (groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "bias": draw(st.booleans()),
        "fixed": draw(st.sampled_from(["none", "inputs", "weight"])),
    }


def tensors(drawn: dict[str, Any], *, transposed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    inside, out = drawn["channels"]
    groups, fixed = drawn["groups"], drawn["fixed"]
    outer = (inside, out) if transposed else (out * groups, inside // groups)
    x = torch.randn(2, inside, *drawn["side"], dtype=torch.float64, requires_grad=fixed != "inputs")
    w = torch.randn(*outer, *drawn["kernel"], dtype=torch.float64, requires_grad=fixed != "weight")
    b = (
        torch.randn(out * groups, dtype=torch.float64, requires_grad=True)
        if drawn["bias"]
        else None
    )
    return x, w, b


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_all_derivatives_to_the_third_are_pytorchs(drawn: dict[str, Any]) -> None:
    function = PLAIN[drawn["n"] - 1]
    how = {name: drawn[name] for name in ("stride", "padding", "dilation", "groups")}

    def call(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return function(x, w, b, **how)

    x, w, b = tensors(drawn, transposed=False)
    with safe_kernels():
        assert is_own(call(x, w, b))
    agree(call, x, w, b)


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_so_they_are_of_transposed_ones(drawn: dict[str, Any]) -> None:
    function = TRANSPOSED[drawn["n"] - 1]

    def call(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return function(
            x, w, b, drawn["stride"], 0, drawn["more"], drawn["groups"], drawn["dilation"]
        )

    x, w, b = tensors(drawn, transposed=True)
    with safe_kernels():
        assert is_own(call(x, w, b))
    # PyTorch's own have no third derivative where there is an output padding.
    agree(call, x, w, b, orders=2)


def test_second_derivatives_are_differences_of_the_first() -> None:
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    own = CONVOLUTIONS[F.conv2d]
    assert torch.autograd.gradcheck(own, (x, w, b))
    assert torch.autograd.gradgradcheck(own, (x, w, b))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_paddings_by_name(padding: str, kernel: int) -> None:
    layer = nn.Conv2d(2, 3, kernel, padding=padding, dilation=(1, 2)).double()
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    agree(lambda x, w, b: F.conv2d(x, w, b, 1, padding, (1, 2)), x, layer.weight, layer.bias)


def test_what_pytorchs_own_are_for_is_left_to_them() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    with safe_kernels():
        assert is_own(layer(x))
        assert not is_own(layer(x[0]))  # a single example
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which keeps one copy of each weight
            assert not is_own(F.conv2d(x.float(), layer.weight.float()))
        with torch.no_grad():
            assert layer(x).grad_fn is None
        empty = F.conv2d(x.to("meta"), layer.weight.to("meta"))  # a device without autocast
    assert empty.shape == (4, 3, 3, 3)


class Taught(Tensor):
    """A tensor of a class with a convolution of its own."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            return "its own"
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_other_classes_of_tensors_have_convolutions_of_their_own() -> None:
    x, w = torch.randn(1, 1, 3, 3), nn.Parameter(torch.randn(1, 1, 2, 2))
    with safe_kernels():
        assert F.conv2d(x.as_subclass(Taught), w) == "its own"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's
def test_transforms_are_pytorchs() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    with safe_kernels():
        each = torch.func.vmap(layer)(x)
        values, along, *_ = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(each, layer(x))
    assert layer.bias is not None
    torch.testing.assert_close(along, values - layer.bias[:, None, None])


def test_transforms_may_begin_around_the_backward_pass() -> None:
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def products() -> list[Tensor]:
        found = F.conv2d(x, w)
        (slope,) = torch.autograd.grad(found.square().sum(), w, create_graph=True)

        def product(v: Tensor) -> Tensor:
            return torch.autograd.grad(slope, x, v, retain_graph=True)[0]

        def curved(v: Tensor) -> Tensor:
            return torch.autograd.grad(found, w, v, create_graph=True)[0]

        outward = torch.stack([found.detach(), found.detach().square()])
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(outward[0], outward[1])  # type: ignore[no-untyped-call]
            along = torch.autograd.grad(found, w, dual, create_graph=True)[0]
            tangent = forward_ad.unpack_dual(along).tangent  # type: ignore[no-untyped-call]
        return [
            torch.func.vmap(product)(torch.stack([w.detach(), w.detach().square()])),
            torch.func.vmap(curved)(outward),
            tangent,
        ]

    truth = products()
    with safe_kernels():
        own = products()
    for a, e in zip(own, truth, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("function", "given", "named"),
    [
        (F.conv2d, ((1, 2, 5), (3, 2, 2)), {}),
        (F.conv1d, ((1, 2, 5, 5), (3, 2, 2, 2)), {}),
        (F.conv_transpose2d, ((1, 2, 5, 5, 5), (2, 3, 2, 2, 2)), {}),
        (F.conv2d, ((1, 2, 5, 5), (3, 2, 3, 3)), {"padding": "same", "stride": 2}),
        (F.conv2d, ((1, 2, 5, 5), (3, 2, 3, 3)), {"padding": "same", "dilation": (1, 1, 1)}),
        (F.conv2d, ((1, 2, 5, 5), (3, 2, 3, 3)), {"stride": (1, 1, 1)}),
        (F.conv2d, ((1, 2, 5, 5), (3, 2, 3, 3)), {"stride": 1.5}),
        (F.conv2d, ((1, 2, 5, 5), (3, 1, 3, 3)), {}),
    ],
)
def test_errors_are_pytorchs(
    function: Callable[..., Tensor],
    given: tuple[tuple[int, ...], tuple[int, ...]],
    named: dict[str, Any],
) -> None:
    x, w = (torch.randn(shape, requires_grad=True) for shape in given)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as truth:
        function(x, w, **named)
    with safe_kernels(), pytest.raises(truth.type) as found:
        function(x, w, **named)
    assert str(found.value) == str(truth.value)


def test_numbers_of_numpy_are_sizes() -> None:
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    two: Any = np.int64(2)
    agree(lambda x, w, b: F.conv2d(x, w, b, stride=two), x, w, None)


def test_complex_numbers_are_left_to_pytorch() -> None:
    x = torch.randn(4, 2, 5, dtype=torch.complex128)
    w = torch.randn(3, 2, 2, dtype=torch.complex128, requires_grad=True)
    with safe_kernels():
        found = F.conv1d(x, w)
    assert not is_own(found)
    torch.testing.assert_close(found, F.conv1d(x, w))


def test_nothing_is_taken_for_hidden_curvature() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.ConvTranspose2d(2, 1, 3))
    with safe_kernels(model):
        loss = model(torch.randn(2, 1, 5, 5)).square().mean()
    assert is_own(loss)
    refuse_hidden_curvature(loss)
