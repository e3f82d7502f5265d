"""Real processes: started in a blink, hit by a signal in the middle, and what they leave behind.

They are forked from a server that has imported what they need. A process of its own, from nothing,
takes three seconds for that; it is for tests of the start itself.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from ift_tune import cli
from ift_tune.base.spawning import signals_deferred

PATIENCE = 120.0

_CONTEXT = multiprocessing.get_context("forkserver")
# The workers of a study are forked from the same server: it is whoever starts one that is first.
_CONTEXT.set_forkserver_preload(
    ["ift_tune.search.processes", "ift_tune.search.loop", "ift_tune.tasks", "torch._dynamo"]
)


class Ended(NamedTuple):
    """How a process ended; its status is the negative of the signal that killed it."""

    status: int
    stdout: str
    stderr: str


class Running:
    """A process that makes a call; used as a context, it does not outlive it."""

    def __init__(
        self, call: Callable[[], object], environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process = _CONTEXT.Process(
            target=_make,
            args=(call, self._outputs, {**os.environ, **(environment or {})}),
        )
        with signals_deferred():  # as the package does, for the server it may start
            self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._folder.cleanup()

    def alive(self) -> bool:
        """Return whether it runs."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def hit(self, number: signal.Signals, when: Callable[[], bool], pause: float = 0.0) -> Ended:
        """Send it a signal a pause after it has come so far, unless it ends before; wait for it."""
        deadline = time.monotonic() + PATIENCE
        while self.alive() and time.monotonic() < deadline:
            if when():
                time.sleep(pause)
                with contextlib.suppress(ProcessLookupError):  # it has ended in the meantime
                    self.send(number)
                break
            time.sleep(0.002)
        return self.wait()

    def wait(self) -> Ended:
        """Wait until it ends."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, "it does not end"
        return Ended(self._process.exitcode, *(path.read_text() for path in self._outputs))


def server_pid() -> int:
    """Return the number of the forkserver, started if there is none."""
    with signals_deferred():
        multiprocessing.forkserver.ensure_running()
    pid: int = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def ift_tune(*arguments: str, environment: Mapping[str, str] | None = None) -> Running:
    """Start the command line."""
    return Running(functools.partial(_command_line, arguments), environment)


def finish(*arguments: str) -> int:
    """Run the command line to its end in this process, and return its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ift-tune", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def wait_for(done: Callable[[], object], what: str) -> None:
    """Wait until something is so; `what` is wrong if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def rows_in(*folders: Path) -> int:
    """Return how many outer steps the records of trials have, while others write them."""
    files = [folder / "steps.csv" for folder in folders]
    return sum(max(0, f.read_text().count("\n") - 1) for f in files if f.exists())


def _command_line(arguments: tuple[str, ...]) -> None:
    sys.argv = ["ift-tune", *arguments]
    cli.main()


def _make(call: Callable[[], object], outputs: list[Path], environment: Mapping[str, str]) -> None:
    """Be the process: with outputs, signals and variables as one that was started from nothing."""
    os.setsid()  # a signal to the group of the tests' process is none of its business
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.clear()
    os.environ.update(environment)
    call()
