"""How a run shows itself while it goes: bars on a terminal, plain lines elsewhere.

Both displays are callbacks, as a user's own would be. They write to standard error, so that
standard output stays machine-readable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from ift_tune.base.errors import EnvironmentFaultError, Interrupted
from ift_tune.base.status import Outcome
from ift_tune.joint.budget import Budget
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import MetaConfig
from ift_tune.trial.training import EVALUATIONS

_SHOWN = ("train", "val", "search", "test")

Self = TypeVar("Self", bound="_Display")  # `typing.Self` is of Python 3.11


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


class _Display(Callback):
    """Bars on a console; used as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self: Self) -> Self:
        """Start the display."""
        if self._console.is_terminal:  # bars that are off end in an empty line all the same, with
            self._bars.start()  # Rich before 14.1
        return self

    def __exit__(self, *exception: object) -> None:
        """End the display."""
        if self._console.is_terminal:
            self._bars.stop()

    def on_resources(self, text: str) -> None:
        """Say what the trials are given."""
        self._say(text)

    def _say(self, line: str) -> None:
        # What a user has named may look like Rich's markup, and is none.
        self._console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


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
        self._running: dict[int, _Running] = {}
        self._plain: TaskID | None = None

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        """Begin a bar, in place of the one of a process that died at the trial."""
        self._remove(number)
        flat = config.to_flat()
        point = " ".join(f"{key}={_short(flat.get(key))}" for key in self._varied)
        if first_step:
            self._say(f"trial {number} resumed after outer step {first_step}")
        bar = self._bars.add_task(
            f"trial {number}", total=self._budget.outer_steps, completed=first_step, state=""
        )
        self._running[number] = _Running(bar, point)

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Advance the bar; off a terminal, write a line every tenth of the way."""
        state = describe_metrics(row)
        self._bars.update(self._running[number].bar, completed=row["step"], state=state)
        every = max(1, (self._budget.outer_steps or 200) // 10)
        if not self._varied and not self._console.is_terminal and row["step"] % every == 0:
            self._say(f"outer step {row['step']}: {state}")

    def on_retraining(self, number: int, inner_steps: int) -> None:
        """Say what takes so long."""
        state = f"retraining for {inner_steps:,} steps, λ frozen"
        self._bars.update(self._running[number].bar, state=state)

    def on_baseline_step(self, row: dict[str, Any]) -> None:
        """Show how far the plain training beside the run is."""
        if self._plain is None:
            self._say("plain training beside it, with λ as the factory sets it")
            self._plain = self._bars.add_task("plain training", total=EVALUATIONS, state="")
        self._bars.update(self._plain, completed=row["step"], state=describe_metrics(row))

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Replace the bar by a line."""
        point = self._remove(number)
        value = "" if outcome.value is None else f": {outcome.metric}={outcome.value:.4g}"
        steps = outcome.metrics.get("step", 0)
        self._say(
            f"trial {number} {outcome.stop_reason.value} after {steps} outer steps{value}"
            f"{'  ' + point if point else ''}"
        )

    def _remove(self, number: int) -> str:
        """Take a trial's bar away and return its point, empty if it has none."""
        running = self._running.pop(number, None)
        if running is None:
            return ""
        self._bars.remove_task(running.bar)
        return running.point


class ComparisonProgress(_Display):
    """Shows how many searches are finished, and that the others are alive; used as a context."""

    def __init__(self, console: Console) -> None:
        """Take where to write."""
        super().__init__(console)
        self._bar = self._bars.add_task("searches", total=None, state="")
        self._steps = 0

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Count the step."""
        self._steps += 1
        self._bars.update(self._bar, state=f"{self._steps:,} outer steps")

    def finished(self, name: str, count: int, total: int) -> None:
        """Say which search has ended."""
        self._bars.update(self._bar, completed=count, total=total)
        self._say(f"{count} of {total}: {name}")


class _Running(NamedTuple):
    """What is shown of a trial at work."""

    bar: TaskID
    point: str


def describe_metrics(row: dict[str, Any]) -> str:
    """Return ``"val_error 0.12  test_error 0.31"``: errors, else losses, else what there is."""
    parts = []
    for split in _SHOWN:
        measured = [k for k in row if k.startswith(f"{split}_") and k != "val_test_gap"]
        usual = [f"{split}_{kind}" for kind in ("error", "loss")]
        name = next((k for k in (*usual, *measured) if k in row), None)
        if name is not None and row[name] is not None:
            parts.append(f"{name} {row[name]:.4g}")
    return "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
