"""Contexts that put a module into the state an outer step needs, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.errors import UsageError
from ift_tune.types import Tensors


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards every submodule has the mode it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextlib.contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Undo changes to buffers: an outer step must not move BatchNorm's running statistics."""
    saved = [(b, b.clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)


@contextlib.contextmanager
def without_gradients(tensors: Tensors) -> Iterator[None]:
    """Make leaf tensors constants: inside, no graph to them is built."""
    for tensor in tensors:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)


@contextlib.contextmanager
def captured_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the model returns, for the Gauss-Newton matrix."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UsageError(
                "curvature='gauss_newton' needs a model that returns one tensor, got "
                f"{type(output).__name__}; use curvature='hessian'"
            )
        outputs.append(output)

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
