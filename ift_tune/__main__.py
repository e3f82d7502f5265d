"""``python -m ift_tune`` and ``ift-tune``: the command line, and Ctrl-C while it is imported."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

_STATUS = 130  # 128 + SIGINT, as a shell says it
_SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar may have hidden


def main() -> None:
    """Run the command line; exit status 0 done, 2 usage error, 1 failure, 130 interrupted.

    Ctrl-C in the middle of an import ends the process at once: libraries turn the exception into
    one of their own, print it or swallow it, and nothing has begun that could be saved.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        from ift_tune.cli import main as run  # here, where Ctrl-C is listened for

        run()
    finally:
        # At the end of the interpreter there is nobody who would catch the exception.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        shown = _SHOW_CURSOR if os.isatty(2) else b""
        os.write(2, shown + b"ift-tune: interrupted\n")
        os._exit(_STATUS)
    signal.default_int_handler(number, frame)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import is going on."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":  # the worker processes of a search import this module under another name
    main()
