"""Convolutions whose second derivatives take as long as their first ones.

PyTorch's second derivative of a convolution takes whole feature maps for kernels and examples for
channels, sizes that no library is fast with. But ⟨g, conv(x, w)⟩ is linear in each of g, x and w:
its derivatives by each, and theirs in turn, are three kernels that libraries are made for, the
convolution and its gradients by the inputs and by the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

_aten = torch.ops.aten
_Sizes = int | Sequence[int]


class Geometry(NamedTuple):
    """How a kernel goes over its inputs, in the order of PyTorch's own arguments."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class _Convolution(Function):
    """conv(x, w) + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        found: Tensor = _aten.convolution(x, w, b, *geometry)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, w) = gradients, ctx.saved_tensors
        by_x, by_w, by_b, _ = ctx.needs_input_grad
        return (
            _apply(_ByInputs, g, x.detach(), w, ctx.geometry) if by_x else None,
            _apply(_ByWeight, g, x, w.detach(), ctx.geometry) if by_w else None,
            g.sum([0, *range(2, g.ndim)]) if by_b else None,
            None,
        )


class _ByInputs(Function):
    """∂⟨g, conv(x, w)⟩/∂x, of which x gives the shape alone."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.geometry = geometry
        return _gradient(g, x, w, geometry, by_inputs=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (u,), (g, w) = gradients, ctx.saved_tensors
        by_g, _, by_w, _ = ctx.needs_input_grad
        return (
            _apply(_Convolution, u, w, None, ctx.geometry) if by_g else None,
            None,
            _apply(_ByWeight, g, u, w.detach(), ctx.geometry) if by_w else None,
            None,
        )


class _ByWeight(Function):
    """∂⟨g, conv(x, w)⟩/∂w, of which w gives the shape alone."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return _gradient(g, x, w, geometry, by_inputs=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (u,), (g, x) = gradients, ctx.saved_tensors
        by_g, by_x, _, _ = ctx.needs_input_grad
        return (
            _apply(_Convolution, x, u, None, ctx.geometry) if by_g else None,
            _apply(_ByInputs, g, x.detach(), u, ctx.geometry) if by_x else None,
            None,
            None,
        )


def _apply(function: type[Function], *given: Any) -> Tensor:
    found: Tensor = function.apply(*given)  # type: ignore[no-untyped-call]
    return found


def _gradient(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, *, by_inputs: bool) -> Tensor:
    found = _aten.convolution_backward(g, x, w, None, *geometry, [by_inputs, not by_inputs, False])
    gradient: Tensor = found[0 if by_inputs else 1]
    return gradient


def _convolution(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Sizes = 1,
    padding: _Sizes | str = 0,
    dilation: _Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Return `function`, a convolution of PyTorch's, of the other arguments."""
    tensors = _ready(input, weight, bias)
    n = weight.ndim - 2
    widths = None if tensors is None else _widths(padding, weight, _all(dilation, n))
    if tensors is None or widths is None:
        return function(input, weight, bias, stride, padding, dilation, groups)
    geometry = Geometry(_all(stride, n), widths, _all(dilation, n), False, [0] * n, groups)
    return _apply(_Convolution, *tensors, geometry)


def _transposed(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Sizes = 1,
    padding: _Sizes = 0,
    output_padding: _Sizes = 0,
    groups: int = 1,
    dilation: _Sizes = 1,
) -> Tensor:
    """Return `function`, a transposed convolution of PyTorch's, of the other arguments."""
    tensors = _ready(input, weight, bias)
    if tensors is None:
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    n = weight.ndim - 2
    steps, widths, gaps, more = (_all(s, n) for s in (stride, padding, dilation, output_padding))
    geometry = Geometry(steps, widths, gaps, True, more, groups)
    return _apply(_Convolution, *tensors, geometry)


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{f: partial(_convolution, f) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{
        f: partial(_transposed, f)
        for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
}
"""What stands in for each of PyTorch's, with its arguments."""


def _ready(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the tensors in the type that they are computed in; None for what is PyTorch's own.

    That is: single examples, complex numbers, `torch.func`'s transforms and forward derivatives,
    and where nothing is differentiated.
    """
    given = [t for t in (x, w, b) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    real = all(t.is_floating_point() for t in given)
    if not (differentiated and real and x.ndim == w.ndim):
        return None
    if torch._C._are_functorch_transforms_active() or any(_is_dual(t) for t in given):
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # PyTorch converts what its own functions are given
        low = torch.get_autocast_dtype(kind)
        x, w, *rest = (t if t.dtype == torch.float64 else t.to(low) for t in given)
        b = rest[0] if rest else None
    return x, w, b


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _all(sizes: _Sizes, n: int) -> list[int]:
    """Return the sizes of all n dimensions; one size is for each of them."""
    several = [sizes] if isinstance(sizes, int) else list(sizes)
    return several * n if len(several) == 1 else several


def _widths(padding: _Sizes | str, weight: Tensor, dilation: list[int]) -> list[int] | None:
    """Return how many zeros are added on each side; None where there are more on one of them."""
    if not isinstance(padding, str):
        return _all(padding, weight.ndim - 2)
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if padding == "valid":
        return [0] * len(spans)
    uneven = padding != "same" or any(span % 2 for span in spans)
    return None if uneven else [span // 2 for span in spans]
