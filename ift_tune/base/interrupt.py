"""Ctrl-C and SIGTERM as requests, heeded where a run can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request that is heeded between outer steps."""

    def __init__(self, *, patient: bool = False, then: Callable[[], object] | None = None) -> None:
        """Take what a signal does.

        Args:
            patient: Whether a second signal is let pass; else it interrupts at once.
            then: Called at the first signal.
        """
        self.requested = False
        self._patient, self._then = patient, then

    @contextlib.contextmanager
    def listening(
        self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    ) -> Iterator[Interrupt]:
        """Listen for the signals, in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            if self._patient:
                return
            raise KeyboardInterrupt
        self.requested = True
        if self._then is not None:
            self._then()
