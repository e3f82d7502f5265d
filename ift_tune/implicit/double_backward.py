"""Products with derivatives of gradients, and what to do where a second derivative is missing."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ift_tune.base.errors import DoubleBackwardError
from ift_tune.base.exclusive import exclusive
from ift_tune.implicit.checkpoints import kept_activations
from ift_tune.implicit.primitives import Primitives
from ift_tune.implicit.vectors import Tensors, fill_missing


def vjp(
    outputs: Tensors, inputs: Tensors, vector: Tensors, *, create_graph: bool = False
) -> list[Tensor]:
    """Return vectorᵀ·∂outputs/∂inputs on the retained graph, zeros where nothing is reached.

    Raises:
        DoubleBackwardError: If an operation on the way has no derivative; it is named.
    """
    found = partial_vjp(outputs, inputs, vector, create_graph=create_graph)
    return fill_missing(found, inputs)


def partial_vjp(
    outputs: Tensors, inputs: Tensors, vector: Tensors, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the same as `vjp`, with None in place of zeros where nothing is reached."""
    if not outputs:  # autograd would refuse an empty list: nothing is curved, so nothing is reached
        return (None,) * len(inputs)
    try:
        # The graph is kept: all products of a solve share one forward pass, and one dropout mask.
        return torch.autograd.grad(
            list(outputs),
            list(inputs),
            grad_outputs=list(vector),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        raise _named_operation(error) from error


_NO_DERIVATIVE = re.compile(r"derivative for '?([\w:]+)'? is not implemented")

BY_DIFFERENCES = 'or set MetaConfig(products="difference"), which takes first derivatives alone'
"""The mend for whatever has a gradient but no second derivative."""

MENDS = {
    "attention": "compute the losses inside `ift_tune.safe_kernels()`",
    "rnn": "compute the losses inside `ift_tune.safe_kernels()`",
    "compile": "use the module without torch.compile in the outer step",
    "differentiable": "write the function's backward with differentiable operations",
}


def _named_operation(error: RuntimeError) -> Exception:
    """Turn autograd's complaint about a missing second derivative into our own error."""
    text = str(error)
    found = _NO_DERIVATIVE.search(text)
    if found is None and "double back" not in text.lower() and "once_differentiable" not in text:
        return error
    operation = found.group(1) if found else text.splitlines()[0]
    mend = next(
        (mend for word, mend in MENDS.items() if word in text.lower()),
        "replace it by an operation with a second derivative",
    )
    return DoubleBackwardError(
        f"the training loss uses {operation}, which has no second derivative: {mend}, "
        f"{BY_DIFFERENCES}"
    )


_cuda = torch.backends.cuda

_ATTENTION: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
)
"""How each kernel of scaled dot product attention is asked for and switched; plain mathematics, the
only one with a second derivative, is the first. They are for all devices, whatever their module."""


class Kernels(NamedTuple):
    """Which of several kernels for the same operation are allowed.

    A graph is differentiated with the kernels it was built with: an activation checkpoint runs its
    forward pass again inside every product, with whatever is allowed then.

    Attributes:
        attention: Whether each of `_ATTENTION` is.
        cudnn: Whether cuDNN is, for anything.
    """

    attention: tuple[bool, ...]
    cudnn: bool

    @classmethod
    def in_force(cls) -> Kernels:
        """Return what is allowed now."""
        return cls(tuple(allowed() for allowed, _ in _ATTENTION), torch.backends.cudnn.enabled)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Allow these kernels inside the context, and afterwards those of before.

        Other threads wait: kernels are allowed for the whole process.
        """
        with exclusive():
            before = Kernels.in_force()
            if self == before:
                yield
                return
            # `cudnn.flags` also resets TF32 and benchmarking, so it is used to switch off only.
            switched_off = before.cudnn and not self.cudnn
            off = torch.backends.cudnn.flags(enabled=False) if switched_off else None
            try:
                _allow_attention(self.attention)
                with off or contextlib.nullcontext():
                    yield
            finally:
                _allow_attention(before.attention)


def _allow_attention(kernels: tuple[bool, ...]) -> None:
    # What `torch.nn.attention.sdpa_kernel` does, in a tenth of its time.
    for (_, allow), allowed in zip(_ATTENTION, kernels, strict=True):
        allow(allowed)


@contextlib.contextmanager
def safe_kernels(model: nn.Module | None = None) -> Iterator[None]:
    """Run forward passes in such a way that they can be differentiated twice.

    Flash and memory-efficient attention, cuDNN's recurrent layers, compiled models and a few
    kernels (of `weight_norm`, distances, embedding bags) cannot: plain mathematics, eager mode and
    primitive operations stand in for them. Activation checkpoints keep their activations, since
    what they would run again later would no longer be in the context of the loss. Convolutions can,
    but slowly; they get second derivatives that take as long as first ones. Wrap only the losses of
    an outer step: plain training keeps what is fast.

    Args:
        model: Keeps cuDNN's (twice differentiable) convolutions when it has no recurrent layer.

    Example:
        >>> import torch, ift_tune
        >>> from torch.nn.functional import scaled_dot_product_attention as attention
        >>> weight = torch.linspace(0.0, 1.0, 8).reshape(1, 1, 2, 4).requires_grad_()
        >>> with ift_tune.safe_kernels():
        ...     loss = attention(weight, weight, weight).square().sum()
        >>> (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        >>> (curvature,) = torch.autograd.grad(slope.sum(), weight)
        >>> curvature.shape
        torch.Size([1, 1, 2, 4])
    """
    recurrent = model is None or any(isinstance(m, nn.RNNBase) for m in model.modules())
    math_only = (True, *[False] * (len(_ATTENTION) - 1))
    kernels = Kernels(math_only, torch.backends.cudnn.enabled and not recurrent)
    with kernels.active(), _eager(), kept_activations(), Primitives():
        yield


def _eager() -> AbstractContextManager[object]:
    """Return a context without `torch.compile`, whose graphs have no second derivative."""
    # Whoever has compiled something has imported this; nobody else should have to.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
