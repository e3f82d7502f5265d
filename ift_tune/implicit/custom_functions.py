"""Custom functions whose backward autograd cannot differentiate in full, found on a graph alone.

A backward may use what it kept beside `save_for_backward`, `.data`, or `torch.no_grad()`. Its
second derivative is then short of a term, and nothing complains. Where losses can be taken again, a
finite difference tells (see the check at the start of a run); where there is only a graph, each
custom backward is run on its own, with and without a small change of what it kept.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import DoubleBackwardError
from ift_tune.implicit.double_backward import graph_nodes

_MEND = "save it by ctx.save_for_backward and compute with it as it comes, outside torch.no_grad()"


def refuse_cut_functions(loss: Tensor) -> None:
    """Look for custom functions whose backward uses tensors that autograd cannot follow.

    What `save_for_backward` kept and is no input, such as a mask, may be a constant or not: a
    warning names it.

    Raises:
        DoubleBackwardError: If a backward uses an input, or a real tensor kept as an attribute,
            without a graph to it.
    """
    for node in graph_nodes(loss):
        function = getattr(node, "_forward_cls", None)
        # PyTorch's own that mark a module's backward hooks pass gradients on as they are.
        if function is not None and not function.__module__.startswith("torch."):
            _examine(node, function)


def _examine(node: Any, function: Any) -> None:
    saved = [t for t in node.saved_tensors if _is_real(t)]
    kept = [t for value in vars(node).values() for t in _tensors(value)]
    if not (saved or kept):
        return
    gradients = [
        torch.ones(m.shape, dtype=m.dtype, device=m.device).requires_grad_()
        for m in node._input_metadata
        if m.dtype.is_floating_point
    ]
    before = _backward(function, node, gradients)
    if before is None:  # it wants other arguments than these: the check at the start is left
        return
    for tensor in kept:
        if tensor.requires_grad:
            continue
        # On its own, for it may share its memory with an input.
        with _replaced(tensor):
            after = _backward(function, node, gradients)
        if _differ(before, after):
            raise DoubleBackwardError(
                f"the training loss uses {function.__name__}, whose backward uses a tensor that "
                f"was kept as an attribute, which has no derivative there: {_MEND}"
            )
    for tensor in saved:
        if _follows(before, tensor):
            continue
        with _changed(tensor):  # in place: each access to what was saved makes another object
            after = _backward(function, node, gradients)
        if not _differ(before, after):
            continue
        if tensor.requires_grad:
            raise DoubleBackwardError(
                f"the training loss uses {function.__name__}, whose backward uses an input "
                f"without a graph to it: {_MEND}"
            )
        warnings.warn(
            f"the backward of {function.__name__} uses a saved tensor that is neither input nor "
            "output of it: if that depends on the weights, second derivatives are wrong. A "
            "`JointOptimizer` compares them with finite differences before its first step of λ",
            stacklevel=2,
        )


def _backward(function: Any, node: Any, gradients: Sequence[Tensor]) -> list[Tensor] | None:
    """Return what a custom backward gives for some gradients, None where it cannot be called."""
    try:
        with torch.enable_grad():
            found = function.backward(node, *gradients)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    parts = found if isinstance(found, tuple) else (found,)
    return [t for t in parts if isinstance(t, Tensor)]


def _differ(before: Sequence[Tensor], after: Sequence[Tensor] | None) -> bool:
    return after is None or not all(map(torch.equal, before, after))


def _other(tensor: Tensor) -> Tensor:
    return tensor.detach() * 1.25 + 0.125


@contextlib.contextmanager
def _replaced(tensor: Tensor) -> Iterator[None]:
    memory = tensor.data
    try:
        tensor.data = _other(tensor)
        yield
    finally:
        tensor.data = memory


@contextlib.contextmanager
def _changed(tensor: Tensor) -> Iterator[None]:
    # By `.data`: the graph goes on using the tensor when it has its bits again.
    place, bits = tensor.data, tensor.detach().clone()
    try:
        place.copy_(_other(tensor))
        yield
    finally:
        place.copy_(bits)


def _follows(outputs: Sequence[Tensor], tensor: Tensor) -> bool:
    """Return whether autograd can follow one of the outputs to a tensor."""
    reached = [t.sum() for t in outputs if t.requires_grad]
    if not (reached and tensor.requires_grad):
        return False
    (found,) = torch.autograd.grad(reached, [tensor], allow_unused=True, retain_graph=True)
    return found is not None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [t for part in value for t in _tensors(part)]
    return [value] if _is_real(value) else []


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
