"""What a loss is taken in, and put back: modes, buffers, what is constant, what is captured."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.implicit.vectors import Tensors

_log = logging.getLogger(__name__)


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


class TrainingModes:
    """The modes in which a model trains: its user's, or training mode where that is lost.

    Example:
        >>> from torch import nn
        >>> from ift_tune.problem.modes import TrainingModes
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> _ = model[1].eval()  # frozen on purpose
        >>> modes = TrainingModes(model)
        >>> _ = model.eval()  # forgotten by a callback
        >>> modes.enter()
        >>> [m.training for m in model.modules()]
        [True, True, False]
    """

    def __init__(self, model: nn.Module) -> None:
        """Put a model that is in evaluation mode as a whole, as hubs give it, in training mode."""
        self._model = model
        if not any(m.training for m in model.modules()):
            model.train()
            _log.warning(
                "the model was in evaluation mode as a whole, and trains in training mode: with "
                "dropout and batch statistics. To keep some of its modules in evaluation mode, "
                "call model.train() first and then .eval() of those"
            )
        self._modes = self._present()

    def enter(self) -> None:
        """Follow what has been frozen or thawed since; but a mode of evaluation alone is undone."""
        present = self._present()
        if any(present.values()):
            self._modes = present
            return
        for module, training in self._modes.items():
            module.training = training

    def _present(self) -> dict[nn.Module, bool]:
        return {m: m.training for m in self._model.modules()}


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
def captured_outputs(model: nn.Module, *, severed: bool = False) -> Iterator[list[Tensor]]:
    """Collect what the model returns, for the Gauss-Newton matrix.

    Args:
        model: Called inside.
        severed: Whether the loss goes on with leaf tensors of the outputs' values.

    Raises:
        UsageError: If the model is not called exactly once, or returns more than one tensor.
    """
    outputs: list[Any] = []

    def capture(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if severed and isinstance(output, Tensor):
            output = output.detach().requires_grad_()
        outputs.append(output)
        return output

    handle = model.register_forward_hook(capture)
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
