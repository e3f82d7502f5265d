"""Processes of one's own: how they are started, what may travel to them, and whom they end with."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from ift_tune.base.errors import UsageError

if TYPE_CHECKING:  # Windows has no forkserver
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

PARENT_DIED = 3
"""The exit status of a process whose parent is gone."""

# Whoever asks PyTorch for GPUs while it is imported must not initialise CUDA:
# https://docs.pytorch.org/docs/stable/notes/multiprocessing.html#poison-fork-in-multiprocessing
FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

LATE_IMPORTS = ("torch._dynamo",)
"""By PyTorch, at an optimiser's first step: it takes a second."""

_DYING_SECONDS = 10.0
_DEFERRED = (signal.SIGINT, signal.SIGTERM) if hasattr(signal, "pthread_sigmask") else ()


def check_importable(*arguments: object, what: str = "study") -> None:
    """Raise a `UsageError` if arguments of a study, or of something else, cannot travel."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    from_nowhere = script is None or not Path(script).exists()
    try:
        pickled = pickle.dumps(arguments)
        if from_nowhere and (script is not None or b"__main__" in pickled):
            raise TypeError("this program is no file that they could import")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"workers are processes of their own, to which this {what} cannot travel ({error}): "
            "problem_factory and sampler must be functions at the top of an importable module, and "
            "callbacks with hooks of the optimisation must be picklable"
        ) from error


def process_context(preloaded: Sequence[str]) -> ForkServerContext | SpawnContext:
    """Return what starts processes.

    Args:
        preloaded: Modules that a forkserver imports, when it is started.
    """
    # macOS has a forkserver too, but its system libraries start threads when they are imported:
    # https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Not the main module, its default: that may do anything, such as look for a GPU.
    context.set_forkserver_preload(list(preloaded))
    return context


def end_with_parent() -> None:
    """End this process when its parent is gone, however that died: nobody would resume it."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(PARENT_DIED)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Start processes that Ctrl-C and SIGTERM do not end, from their first instruction on.

    A forkserver stays so: these signals may be sent to all processes of a terminal or a job, and
    without it nobody would know which workers are alive.
    """
    if not _DEFERRED:  # on Windows
        yield
        return
    # Python starts this helper with the first process, and unblocks the signals when it has.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEFERRED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(process: BaseProcess, environment: Mapping[str, str]) -> None:
    """Start a process with environment variables of its own, and signals deferred.

    Args:
        process: Of `process_context`.
        environment: Its variables, beside those of this process.
    """
    with variables({**environment, **FORK_SAFE}), signals_deferred():
        refused = time.monotonic() + _DYING_SECONDS
        while True:
            try:
                return process.start()
            except ConnectionRefusedError:  # the forkserver was killed, and is not quite gone
                if time.monotonic() > refused:
                    raise
                time.sleep(0.05)


def receive_deferred_signals() -> None:
    """Let the signals come through, in a process that was started so."""
    if _DEFERRED:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEFERRED)


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
