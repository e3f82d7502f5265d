"""What surrounds a long command: its display, and how it says that it can be resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ift_tune.cli.progress import ConsoleListener
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget
from ift_tune.trial.runner import Interrupted

_errors = Console(stderr=True)


@contextlib.contextmanager
def listening(quiet: bool, budget: Budget, varied: tuple[str, ...] = ()) -> Iterator[Callback]:
    """Show how trials go, on standard error; nothing if `quiet`."""
    if quiet:
        yield Callback()
        return
    with ConsoleListener(_errors, budget, varied) as listener:
        yield listener


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            f"interrupted; go on with the same command and --out {out} --resume"
        ) from error
