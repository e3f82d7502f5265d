"""A Ray that dies under a search: said in a sentence, where Ray itself would wait without end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import ray

from ift_tune.base.errors import EnvironmentFaultError

_SIGNAL = getattr(signal, "SIGUSR2", None)  # Windows has none
_LOOK_SECONDS = 2.0
_PATIENCE = 12.0  # seconds without an answer, which a busy machine gives late
_GRACE = 15.0  # further ones until this process has left whatever it waits in

_GONE = (
    "Ray's processes on this machine are gone, killed from outside or for want of memory: "
    "everything up to the latest checkpoints is kept, and --resume (resume=True) goes on"
)

_log = logging.getLogger(__name__)


class _LostRayError(BaseException):
    """No `Exception`, of which Ray would take care by waiting for its processes."""


class _Watch:
    """Asks Ray whether the node that this process is on lives, and interrupts if it does not."""

    def __init__(self) -> None:
        self.lost = False
        self._node = ray.get_runtime_context().get_node_id()
        self._heard, self._over = time.monotonic(), threading.Event()

    def start(self) -> None:
        # Where nobody answers, whoever asks waits: somebody else looks at the clock.
        for work in (self._ask, self._look):
            threading.Thread(target=work, name="watch-ray", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _ask(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):
                if any(node["NodeID"] == self._node and node["Alive"] for node in ray.nodes()):
                    self._heard = time.monotonic()

    def _look(self) -> None:
        while time.monotonic() - self._heard < _PATIENCE:
            if self._over.wait(_LOOK_SECONDS / 2):
                return
        self.lost, deadline = True, time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            # Again and again: Ray's code turns what the handler raises into an error of its own,
            # and may go on after that.
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL or 0)
            if self._over.wait(_LOOK_SECONDS):
                return
        # In a call of Ray's that no signal ends. Its core ends this process a minute after the
        # loss, whatever one does, and says nothing of how to go on.
        sys.stderr.write(f"ift-tune: {_GONE}\n")
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """End what runs inside within a minute when Ray is gone; in the main thread only.

    Raises:
        EnvironmentFaultError: Then.
    """
    if _SIGNAL is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch()
    before = signal.signal(_SIGNAL, _raise_lost)
    watch.start()
    try:
        yield
    except BaseException as error:
        if not watch.lost:
            raise
        _log.debug("ended by %r", error)  # whatever Ray's code has made of it on the way
        raise EnvironmentFaultError(_GONE) from None
    finally:
        watch.stop()
        signal.signal(_SIGNAL, before)


def _raise_lost(_number: int, _frame: FrameType | None) -> None:
    raise _LostRayError
