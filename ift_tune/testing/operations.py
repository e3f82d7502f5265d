"""Which operations of a training loss an outer step replaces, and in which modules they are.

The loss is computed twice, on the kernels of plain training and on those of an outer step, with the
same random numbers. What is a node of the first graph and of no place in the second was replaced:
no list of operations has to be kept up to date for that, only their names in words.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hidden_curvature import graph_nodes, is_checkpointed
from ift_tune.problem.batches import Batch
from ift_tune.problem.modes import preserved_buffers
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_loss

ATTENTION = "fast attention"
REENTRANT, NOT_REENTRANT = "a reentrant checkpoint", "a checkpoint without reentrance"
_CONVOLUTION = "a convolution"

_WORDS = {
    "ScaledDotProduct": ATTENTION,
    "CudnnRnn": "a recurrent layer of cuDNN",
    "WeightNorm": "weight_norm",
    "EmbeddingBag": "an embedding bag",
    "Compiled": "a compiled graph",
    "CheckpointFunction": REENTRANT,
    # The same operation, whose second derivative alone is another.
    "Convolution": _CONVOLUTION,
    "_Convolution": _CONVOLUTION,
}
"""How the names of autograd's nodes begin, in words; others are named as autograd does."""

_INSTEAD = {
    ATTENTION: "plain mathematics",
    REENTRANT: "kept activations",
    NOT_REENTRANT: "kept activations",
    "a compiled graph": "eager mode",
}
_ELSEWHERE = "ordinary operations"


@dataclass(frozen=True)
class Replaced:
    """An operation that safe kernels stand in for.

    Attributes:
        operation: In words.
        modules: The innermost modules it is called in.
    """

    operation: str
    modules: list[str]

    def __str__(self) -> str:
        """Return a phrase."""
        instead = _INSTEAD.get(self.operation, _ELSEWHERE)
        return f"{self.operation} in {listed(self.modules)} (in outer steps: {instead})"


@dataclass(frozen=True)
class Operations:
    """What was seen of the training loss.

    Attributes:
        replaced: What safe kernels stand in for.
        functions: Modules by the names of the custom functions that are called in them.
        spread: How far the loss changes with other random numbers, relative to itself; 0 where it
            draws none.
        precisions: Types of low precision that values on the way have.
    """

    replaced: list[Replaced]
    functions: dict[str, list[str]]
    spread: float
    precisions: list[str]


def listed(names: list[str], most: int = 3) -> str:
    """Return some names, and how many more there are."""
    shown = ", ".join(name or "the model" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def observe_operations(problem: BilevelProblem, batch: Batch) -> Operations:
    """Look at the training loss of a batch, for the price of three forward passes.

    Args:
        problem: In the modes it trains in; its buffers stay as they are.
        batch: Of the training data, on the problem's device.

    Raises:
        DoubleBackwardError: If an operation is refused as soon as it is called.

    Example:
        >>> import torch
        >>> from ift_tune import testing
        >>> from ift_tune.testing.operations import observe_operations
        >>> observe_operations(testing.Quadratic(), torch.zeros(1)).replaced
        []
    """
    before = GlobalState(problem.weights()[0].device)
    device = problem.weights()[0].device
    with drawn_again(before, device):
        plain, loss = _labels(problem, batch)
        other = float(_loss(problem, batch).detach())  # with the random numbers that come next
        again = float(loss.detach())
    with drawn_again(before, device), safe_kernels(problem.model):
        kept = set(_labels(problem, batch)[0])
    gone = [Replaced(what, where) for what, where in plain.items() if what not in kept]
    functions = {
        what.removesuffix("Backward"): where
        for what, where in plain.items()
        if what in kept and what in _custom(loss)
    }
    spread = abs(other - again) / max(abs(again), 1e-12)
    return Operations(gone, functions, spread, _precisions(loss))


def _loss(problem: BilevelProblem, batch: Batch) -> Tensor:
    with preserved_buffers(problem.model), torch.enable_grad():
        return as_loss(problem.train_loss(batch), "train_loss")


def _labels(problem: BilevelProblem, batch: Batch) -> tuple[dict[str, list[str]], Tensor]:
    """Return the modules by what is called in them, and the loss."""
    calls: list[tuple[int, int, str]] = []
    with _noting_calls(problem.model, calls):
        loss = _loss(problem, batch)
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for node in graph_nodes(loss):
        found[_label(node)][_innermost(calls, node)] = None
    return {what: sorted(where) for what, where in found.items()}, loss


@contextlib.contextmanager
def _noting_calls(model: nn.Module, calls: list[tuple[int, int, str]]) -> Iterator[None]:
    """Note when each module's forward begins and ends, in autograd's own count of nodes."""
    begun: list[int] = []

    def begin(_module: nn.Module, _args: object) -> None:
        begun.append(_now())

    handles = []
    for name, module in model.named_modules():

        def end(_module: nn.Module, _args: object, _output: object, name: str = name) -> None:
            calls.append((begun.pop(), _now(), name))

        handles += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _now() -> int:
    with torch.enable_grad():
        node: Any = (torch.zeros(1, requires_grad=True) * 1.0).grad_fn
    return int(node._sequence_nr())


def _innermost(calls: list[tuple[int, int, str]], node: Any) -> str:
    number = node._sequence_nr() if hasattr(node, "_sequence_nr") else -1
    around = [(end - begin, name) for begin, end, name in calls if begin < number < end]
    return min(around)[1] if around else ""


def _label(node: Any) -> str:
    if is_checkpointed(node):
        return NOT_REENTRANT
    name: str = node.name()
    return next((words for start, words in _WORDS.items() if name.startswith(start)), name)


def _custom(loss: Tensor) -> set[str]:
    """Return the labels of the custom functions that are not PyTorch's own."""
    return {
        node.name()
        for node in graph_nodes(loss)
        if hasattr(node, "_forward_cls") and not node._forward_cls.__module__.startswith("torch.")
    }


def _precisions(loss: Tensor) -> list[str]:
    """Return the low precisions of values on the way to a loss."""
    low = (torch.bfloat16, torch.float16)
    found = {
        str(entry.dtype).removeprefix("torch.")
        for node in graph_nodes(loss)
        for entry in getattr(node, "_input_metadata", ())
        if entry.dtype in low
    }
    return sorted(found)
