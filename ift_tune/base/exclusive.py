"""One thread at a time, where the state that PyTorch keeps for the whole process is swapped."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import torch

_log = logging.getLogger(__name__)


class _State:
    lock = threading.RLock()
    told = False


def _renew() -> None:
    # A thread that held the lock is not there in a process forked meanwhile.
    _State.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Keep the other threads of this process out of all such contexts.

    Global generators and the choice of kernels belong to the process: threads that swap them would
    take each other's. So trials in threads take their steps by turns, with the numbers that
    each has by itself. The same thread may enter again.

    Example:
        >>> from ift_tune.base.exclusive import exclusive
        >>> with exclusive(), exclusive():
        ...     print("ours")
        ours
    """
    lock = _State.lock
    if not lock.acquire(blocking=False):
        if _in_backward():
            yield
            return
        _tell()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _in_backward() -> bool:
    """Return whether autograd runs this thread for another one.

    On a GPU it runs in threads of its own, activation checkpoints' second forward passes too. Their
    caller waits for them, perhaps inside the context, so that they must not wait for it.
    """
    current: int = torch._C._current_graph_task_id()
    return current != -1


def _tell() -> None:
    if not _State.told:
        _State.told = True
        _log.warning(
            "threads of this process take their steps by turns, as PyTorch has one set of random "
            "generators and kernels for all: instead of n_jobs, run_study(..., workers=2) runs "
            "trials side by side, each in a process"
        )
