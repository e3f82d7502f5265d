"""Contexts that put a module into the state an outer step needs, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.implicit.vectors import Tensors


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards every submodule has the mode it had."""
    # One by one: a user may keep some submodules, such as frozen BatchNorm, in evaluation mode.
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextlib.contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Let copies stand in for the buffers: an outer step must not move BatchNorm's statistics.

    Copies, not a restoration afterwards: graphs built before, inside and after stay valid.
    """
    saved = [
        (m, name, buffer)
        for m in module.modules()
        for name, buffer in m.named_buffers(recurse=False, remove_duplicate=False)
    ]
    # By identity: a buffer that two modules share must stay shared.
    copies = {id(buffer): buffer.clone() for _, _, buffer in saved}
    for submodule, name, buffer in saved:
        setattr(submodule, name, copies[id(buffer)])
    try:
        yield
    finally:
        for submodule, name, buffer in saved:
            setattr(submodule, name, buffer)


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
    """Collect what the model returns, for the Gauss-Newton matrix.

    Raises:
        UsageError: If the model is not called exactly once, or returns more than one tensor.
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        found = ", ".join(type(output).__name__ for output in outputs) or "no call"
        raise UsageError(
            "curvature='gauss_newton' needs a training loss that calls the model once and a model "
            f"that returns one tensor, got {found}; use curvature='hessian'"
        )
