"""Curvature that autograd is silent about: what is missing in it, or wrong, and can be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import CheckpointFunction

from ift_tune.base.errors import DoubleBackwardError
from ift_tune.implicit.double_backward import BY_DIFFERENCES, MENDS
from ift_tune.implicit.vectors import Tensors

WRONG_KERNELS = {
    "WeightNormInterfaceBackward0": "weight_norm's kernel (which takes the norm for a constant)",
}
"""Operations whose second derivative PyTorch computes wrong without a word, by their nodes."""


def graph_nodes(loss: Tensor) -> Iterator[Any]:
    """Yield each node of the graph that leads to `loss`, once."""
    # Node by node and not by recursion: a deep net's graph is deeper than Python's stack.
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def is_checkpointed(node: Any) -> bool:
    """Return whether a node's values are computed again by an activation checkpoint.

    False in versions of PyTorch that do not show the hook which does so.
    """
    hooks: list[Any] = []
    with contextlib.suppress(RuntimeError):  # the graph has been freed
        kind: Any = type(node)
        saved = [getattr(node, name) for name in _saved_names(kind)]
        hooks = [getattr(tensor, "unpack_hook", None) for tensor in saved]
    return any(getattr(h, "__module__", "") == torch.utils.checkpoint.__name__ for h in hooks)


@cache
def _saved_names(node: Any) -> list[str]:
    return [name for name in dir(node) if name.startswith("_raw_saved_")]


def refuse_hidden_curvature(loss: Tensor) -> None:
    """Look for functions whose missing or wrong second derivative autograd is silent about.

    With unused inputs allowed, `torch.autograd.grad` takes their curvature for zero: custom
    functions with a ``once_differentiable`` backward or one that is cut off from their inputs,
    and reentrant activation checkpoints. And some kernels are wrong (`WRONG_KERNELS`).

    Raises:
        DoubleBackwardError: If there is one on the way to `loss`; it is named.
    """
    for node in graph_nodes(loss):
        if (kernel := WRONG_KERNELS.get(node.name())) is not None:
            raise DoubleBackwardError(
                f"the training loss uses {kernel}, whose second derivative is wrong: compute the "
                f"losses inside `ift_tune.safe_kernels()`, {BY_DIFFERENCES}"
            )
        if hasattr(node, "_forward_cls"):
            _refuse_function(node)


def _refuse_function(node: Any) -> None:
    function = node._forward_cls
    if function is CheckpointFunction:
        raise DoubleBackwardError(
            "the training loss uses torch.utils.checkpoint with use_reentrant=True, which has no "
            "second derivative: compute the losses inside `ift_tune.safe_kernels()`, or set "
            f"use_reentrant=False, {BY_DIFFERENCES}"
        )
    code = getattr(getattr(function, "backward", None), "__code__", None)
    # The decorator replaces backward by a function called wrapper, defined in torch's module.
    if code and (code.co_filename, code.co_name) == (torch.autograd.function.__file__, "wrapper"):
        raise DoubleBackwardError(
            f"the training loss uses {function.__name__}, whose backward is once_differentiable: "
            f"{MENDS['differentiable']}, {BY_DIFFERENCES}"
        )
    # PyTorch's own, as for a module's backward hooks, pass gradients on as they are; those of
    # `convolutions` keep their inputs, and to ask each of them would be a backward pass.
    if not function.__module__.startswith(("torch.", "ift_tune.")) and _is_detached(node):
        raise DoubleBackwardError(
            f"the training loss uses {function.__name__}, whose backward keeps numbers that are "
            "cut off from its inputs, so that its second derivative would be taken for zero: let "
            "save_for_backward keep the inputs themselves, and differentiate by them in backward, "
            f"{BY_DIFFERENCES}"
        )


def _is_mask(tensor: Tensor) -> bool:
    """Return whether all entries are 0, 1 or −1: which side of a kink something is on."""
    return bool(((tensor == 0) | (tensor.abs() == 1)).all())


def _is_detached(node: Any) -> bool:
    """Return whether a custom function's backward depends on numbers, and not on its inputs.

    A linear function keeps nothing and needs nothing, one that is linear piece by piece a mask. One
    that keeps other real numbers is curved (or has a constant argument), and then the gradient must
    lead back to where its inputs came from.
    """
    kept = [*vars(node).values(), *node.saved_tensors]
    if not any(isinstance(t, Tensor) and t.is_floating_point() and not _is_mask(t) for t in kept):
        return False
    like = node._input_metadata
    with torch.enable_grad():
        gradients = [
            torch.ones(m.shape, dtype=m.dtype, device=m.device).requires_grad_()
            if m.dtype.is_floating_point
            else None
            for m in like
        ]
        found = node.apply(*gradients)
    found = found if isinstance(found, tuple) else (found,)
    origins = {following for following, _ in node.next_functions} - {None}
    roots = [g for g in found if isinstance(g, Tensor) and g.requires_grad]
    return not any(n in origins for g in roots for n in graph_nodes(g))


def refuse_power_iteration(model: nn.Module) -> None:
    """Look for spectral normalisation that goes on with its power iteration.

    Its singular vectors follow the weights, and autograd takes them for constants: the gradient is
    right once they have converged, the second derivative never is.

    Raises:
        DoubleBackwardError: If there is one; its module is named.
    """
    for name, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        old = any(isinstance(hook, SpectralNorm) for hook in hooks)
        # The parametrisation's class is private: its name is all there is.
        if module.training and (old or type(module).__name__ == "_SpectralNorm"):
            raise DoubleBackwardError(
                "the training loss uses spectral_norm, whose power iteration has no second "
                "derivative: hold its singular vectors by "
                f"model.get_submodule({name!r}).eval() after model.train(), or normalise by "
                "torch.linalg.matrix_norm(weight, 2) in a parametrization"
            )


def refuse_repetition(losses: Tensors, model: nn.Module) -> None:
    """Refuse checkpoints in losses of a model whose numbers depend on its mode.

    They run again in every product, in the mode that the model has then: it may no longer be that
    of the loss, and nobody could tell.

    Raises:
        DoubleBackwardError: If there is one; the module whose mode matters is named.
    """
    moded = [n for n, m in model.named_modules() if isinstance(m, _NormBase | _DropoutNd)]
    graphs = [graph_nodes(loss) for loss in losses if isinstance(loss, Tensor)]
    if moded and any(is_checkpointed(node) for graph in graphs for node in graph):
        raise DoubleBackwardError(
            "a loss uses torch.utils.checkpoint, which runs the model again in whatever mode it is "
            f"in by then, and {moded[0]} depends on the mode: compute the losses inside "
            "`ift_tune.safe_kernels()`, where checkpoints keep their activations"
        )
