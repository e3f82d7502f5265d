"""How a run of the command line shows itself: bars on a terminal, plain lines elsewhere.

The display is `ift_tune.Progress`, the callback that anyone can use. It writes to standard error,
so that standard output stays machine-readable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ift_tune.base.errors import EnvironmentFaultError, Interrupted
from ift_tune.trial.progress import Progress, describe_metrics
from ift_tune.trial.screens import Terminal

__all__ = ["describe_metrics", "progress_unless", "resumable"]


def progress_unless(quiet: bool) -> Progress:
    """Return the display of a command: bars on a terminal, else lines; nothing if `quiet`."""
    return Progress(screen=Terminal(Console(stderr=True, quiet=quiet)))


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except EnvironmentFaultError:
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            f"interrupted; go on with the same command and --out {out} --resume"
        ) from error
