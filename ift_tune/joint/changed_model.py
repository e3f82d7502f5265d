"""Callbacks that change the model, which trainings without outer steps do not call."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator

from torch import nn

from ift_tune.base.once import is_new

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def saying_changes(model: nn.Module, who: str, known: set[str]) -> Iterator[None]:
    """Say once in a run if the model is changed inside, as by an average of its weights.

    Args:
        model: Whose parameters and buffers are looked at.
        who: The hook that is called inside.
        known: The hooks that have done so; it is added to them, and looked at no more.
    """
    if who in known:
        yield
        return
    before = _versions(model)
    yield
    if _versions(model) == before:
        return
    known.add(who)
    if is_new(who):
        _log.warning(
            "%s changes the model, and is not called in trainings with λ frozen (the retraining, "
            "the baseline, a refit), which have no outer steps and so are of another model: let "
            "the model's own forward do it, to buffers and in training mode, as BatchNorm does "
            "(docs/callbacks.md)",
            who,
        )


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return which tensors a model has, and how often each has been written to."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(id(tensor), tensor._version) for tensor in tensors]
