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
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

_gradients = torch.ops.aten.convolution_backward.default
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
    def value(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        return torch.convolution(x, w, b, *geometry)

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _Convolution.value(x, w, b, geometry)

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
    def value(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        found: Tensor = _gradients(g, x, w, None, *geometry, [True, False, False])[0]
        return found

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.geometry = geometry
        return _ByInputs.value(g, x, w, geometry)

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
    def value(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        found: Tensor = _gradients(g, x, w, None, *geometry, [False, True, False])[1]
        return found

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return _ByWeight.value(g, x, w, geometry)

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


def _apply(function: type[_Convolution | _ByInputs | _ByWeight], *given: Any) -> Tensor:
    """Return the value of a function, with its own derivatives or with PyTorch's.

    The transforms of `torch.func` and forward derivatives have rules for PyTorch's alone. They may
    be begun around the backward pass of a graph that was made without them.
    """
    if torch._C._are_functorch_transforms_active() or any(map(_is_dual, given)):
        return function.value(*given)
    found: Tensor = function.apply(*given)  # type: ignore[no-untyped-call]
    return found


def _is_dual(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def _convolution(
    function: Callable[..., Tensor],
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Sizes = 1,
    padding: _Sizes | str = 0,
    dilation: _Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Return `function`, a convolution of PyTorch's over n dimensions, of the other arguments."""
    if _is_usual(n, input, weight, bias):
        steps, gaps = _all(stride, n), _all(dilation, n)
        if steps and gaps and (widths := _widths(padding, weight, steps, gaps)):
            geometry = Geometry(steps, widths, gaps, False, [0] * n, groups)
            return _apply(_Convolution, input, weight, bias, geometry)
    return function(input, weight, bias, stride, padding, dilation, groups)


def _transposed(
    function: Callable[..., Tensor],
    n: int,
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
    if _is_usual(n, input, weight, bias):
        steps, widths, gaps = _all(stride, n), _all(padding, n), _all(dilation, n)
        more = _all(output_padding, n)
        if steps and widths and gaps and more:
            geometry = Geometry(steps, widths, gaps, True, more, groups)
            return _apply(_Convolution, input, weight, bias, geometry)
    return function(input, weight, bias, stride, padding, output_padding, groups, dilation)


_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{f: partial(_convolution, f, n) for n, f in enumerate(_PLAIN, start=1)},
    **{f: partial(_transposed, f, n) for n, f in enumerate(_TRANSPOSED, start=1)},
}
"""What stands in for each of PyTorch's, with its arguments.

What is not usual is left to PyTorch, with its errors: single examples, complex numbers, autocast
(which keeps one copy of a weight for all of its uses), tensors of other classes, and where nothing
is differentiated.
"""


def _is_usual(n: int, x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Return whether batches of real numbers go through a convolution that is differentiated."""
    given = [x, w] if b is None else [x, w, b]
    # Another class may have a convolution of its own.
    if any(type(t) not in (Tensor, nn.Parameter) for t in given) or not torch.is_grad_enabled():
        return False
    kind = x.device.type
    if is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return False
    real = all(t.is_floating_point() for t in given)
    return real and x.ndim == w.ndim == n + 2 and any(t.requires_grad for t in given)


def _all(sizes: object, n: int) -> list[int] | None:
    """Return the sizes of all n dimensions, of which one may stand for each; None for no sizes."""
    several = [sizes] if isinstance(sizes, int) else sizes
    if not isinstance(several, list | tuple) or not all(isinstance(s, int) for s in several):
        return None
    if len(several) == 1:
        return list(several) * n
    return list(several) if len(several) == n else None


def _widths(
    padding: _Sizes | str, weight: Tensor, steps: list[int], gaps: list[int]
) -> list[int] | None:
    """Return how many zeros are added on each side; None where there are more on one of them."""
    if padding == "valid":
        return [0] * len(steps)
    if padding != "same":
        return _all(padding, len(steps))
    spans = [d * (k - 1) for d, k in zip(gaps, weight.shape[2:], strict=True)]
    even = all(span % 2 == 0 for span in spans) and set(steps) == {1}
    return [span // 2 for span in spans] if even else None
