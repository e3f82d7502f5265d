"""Functions that `torch.func.vmap` takes apart, done for all members by kernels of their own.

By its rules a linear layer becomes a product, a scaling, an addition and copies, and a
cross-entropy comparisons and choices: five and ten operations where two do. On a device each is a
kernel to launch, on a processor a pass over the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.nn import functional as F

from ift_tune.implicit.primitives import StandIns
from ift_tune.implicit.vectors import is_stacked

_NEEDED = (
    "maybe_current_level",
    "current_level",
    "get_dynamic_layer_stack_depth",
    "maybe_get_bdim",
    "get_unwrapped",
    "_add_batch_dim",
)
_KNOWN = all(hasattr(functorch, name) for name in _NEEDED)  # PyTorch promises none of them


def _stacks(*tensors: Tensor) -> list[Tensor] | None:
    """Return what `vmap` has made tensors of one member of, the members first.

    None where it is not at work, or not alone. The public way to a rule of one's own for `vmap`, a
    `torch.autograd.Function` that has one, takes as long in Python as it would save.
    """
    if not _KNOWN or functorch.maybe_current_level() is None:
        return None
    if functorch.get_dynamic_layer_stack_depth() != 1:
        return None
    places = [functorch.maybe_get_bdim(t) if is_stacked(t) else None for t in tensors]
    bare = [
        functorch.get_unwrapped(t) if p is not None else t
        for t, p in zip(tensors, places, strict=True)
    ]
    sizes = [t.shape[p] for t, p in zip(bare, places, strict=True) if p is not None]
    if not sizes:
        return None
    return [
        t.expand(sizes[0], *t.shape) if p is None else t.movedim(p, 0)
        for t, p in zip(bare, places, strict=True)
    ]


def _of_one(stack: Tensor) -> Tensor:
    """Return a stack as the tensor of one member, as `vmap` has it."""
    found: Tensor = functorch._add_batch_dim(stack, 0, functorch.current_level())
    return found


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    stacks = None
    # A bias may also be a number, or one for each example.
    if bias is not None and (inputs.ndim, weight.ndim, bias.ndim) == (2, 2, 1):
        alike = inputs.dtype == weight.dtype == bias.dtype
        stacks = _stacks(inputs, weight, bias) if alike else None
    if stacks is None:
        return F.linear(inputs, weight, bias)
    x, w, b = stacks
    # The product of the transposed, as its gradient by W is then no transposed one: it takes no
    # copy to lie beside the others.
    return _of_one(torch.baddbmm(b.unsqueeze(2), w, x.transpose(1, 2)).transpose(1, 2))


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    classes = input.ndim == 2 and target.ndim == 1 and not target.is_floating_point()
    usual = (weight, size_average, reduce, label_smoothing) == (None, None, None, 0.0)
    usual = usual and reduction in ("mean", "sum", "none")
    stacks = _stacks(input, target) if usual and classes else None
    if stacks is None:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    rows, numbers = stacks
    losses = F.cross_entropy(
        rows.transpose(1, 2), numbers.long(), ignore_index=ignore_index, reduction="none"
    )
    if reduction == "mean":
        return _of_one(losses.sum(dim=1) / (numbers != ignore_index).sum(dim=1))
    return _of_one(losses if reduction == "none" else losses.sum(dim=1))


class StackedKernels(StandIns):
    """Inside, for what `vmap` is asked of, kernels for all members stand in for functions."""

    functions: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {
        F.linear: _linear,
        F.cross_entropy: _cross_entropy,
    }
