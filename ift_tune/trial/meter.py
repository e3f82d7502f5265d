"""The time that a trial has taken, and the most memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from ift_tune.base.environment import peak_memory_bytes, reset_peak_memory


class Meter:
    """A clock that runs while a trial computes, and the peak of its memory from now on."""

    def __init__(self, device: torch.device) -> None:
        """Begin."""
        self._device, self._before = device, 0.0
        self._started: float | None = None
        reset_peak_memory(device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the clock run inside."""
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._started = self.seconds, None

    def resume(self, seconds: float) -> None:
        """Go on after so many."""
        self._before = seconds

    def charge(self, seconds: float) -> None:
        """Add what was computed elsewhere."""
        self._before += seconds

    @property
    def seconds(self) -> float:
        """All so far, what is running now too."""
        return self._before + (
            0.0 if self._started is None else time.perf_counter() - self._started
        )

    def peak(self, known: int | None) -> int | None:
        """Return the most bytes so far.

        Args:
            known: What it was before: a retraining on the way begins the count anew.
        """
        now = peak_memory_bytes(self._device)
        return now if now is None or known is None else max(now, int(known))
