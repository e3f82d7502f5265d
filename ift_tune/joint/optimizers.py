"""The optimisers a `MetaConfig` can name, in their fastest form."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, optim

from ift_tune.base.errors import UsageError, nearest
from ift_tune.implicit.vectors import Tensors

_FACTORIES: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda params, lr: optim.SGD(params, lr=lr, fused=True),
    "momentum": lambda params, lr: optim.SGD(params, lr=lr, momentum=0.9, fused=True),
    "adam": lambda params, lr: optim.Adam(params, lr=lr, fused=True),
    "rmsprop": lambda params, lr: optim.RMSprop(params, lr=lr, foreach=True),
}


OPTIMIZERS = tuple(_FACTORIES)
"""None has a weight decay of its own: decay that is not in the training loss escapes the implicit
function theorem."""


def check_optimizer(role: str, name: str) -> None:
    """Raise a `UsageError` unless `name` is a known optimiser."""
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown {role} {name!r}{nearest(str(name), OPTIMIZERS)}")


def make_optimizer(name: str, tensors: Tensors, lr: float) -> optim.Optimizer:
    """Return a new optimiser over `tensors`."""
    params: list[Tensor] = list(tensors)
    return _FACTORIES[name](params, lr)
