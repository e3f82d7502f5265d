"""How a run of the command line shows itself: bars on a terminal, plain lines elsewhere.

The displays are `ift_tune.Progress`, the callback that anyone can use. They write to standard
error, so that standard output stays machine-readable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from typing_extensions import Self

from ift_tune.base.errors import EnvironmentFaultError, Interrupted
from ift_tune.joint.budget import Budget
from ift_tune.trial.progress import Progress, describe_metrics
from ift_tune.trial.screens import Terminal

__all__ = ["ComparisonProgress", "TrialProgress", "describe_metrics", "open_console", "resumable"]


def open_console(quiet: bool) -> Console:
    """Return standard error as Rich sees it; nothing is written to it if `quiet`."""
    return Console(stderr=True, quiet=quiet)


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


class _Display(Progress):
    """Lines also where there is no terminal; used as a context."""

    def __init__(self, console: Console) -> None:
        super().__init__(screen=Terminal(console))

    def __enter__(self) -> Self:
        """Start the display."""
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the display."""
        self._end()


class TrialProgress(_Display):
    """Shows a bar per running trial, and one line per finished one; used as a context."""

    def __init__(self, console: Console, budget: Budget, varied: tuple[str, ...] = ()) -> None:
        """Take where to write.

        Args:
            console: Where to.
            budget: Of a trial; gives the length of the bar where it counts outer steps.
            varied: Keys of the space, named in each trial's line.
        """
        super().__init__(console)
        self._budget, self._varied = budget, varied


class ComparisonProgress(_Display):
    """Shows how many searches are finished, and that the others are alive; used as a context."""

    def __init__(self, console: Console) -> None:
        """Take where to write."""
        super().__init__(console)
        self._counts_searches = True
