"""How a comparison shows itself while it goes: one bar of searches, one line for each that ends."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ift_tune.joint.callbacks import Callback


class ComparisonListener(Callback):
    """Shows how many searches are finished, and that the others are alive; used as a context."""

    def __init__(self, console: Console) -> None:
        """Take where to write."""
        self._console = console
        self._bars = Progress(
            TextColumn("searches"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._bars.add_task("", total=None, state="")
        self._steps = 0

    def __enter__(self) -> ComparisonListener:
        """Start the display."""
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the display."""
        self._bars.stop()

    def on_resources(self, text: str) -> None:
        """Say what the searches are given."""
        self._console.print(text, soft_wrap=True, highlight=False)

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Count the step."""
        self._steps += 1
        self._bars.update(self._bar, state=f"{self._steps:,} outer steps")

    def finished(self, name: str, count: int, total: int) -> None:
        """Say which search has ended."""
        self._bars.update(self._bar, completed=count, total=total)
        self._console.print(f"{count} of {total}: {name}", soft_wrap=True, highlight=False)
