"""Where progress is shown: on a terminal, in a notebook, or nowhere."""

from __future__ import annotations

import abc
import html
import itertools
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

_BARS, _LINES = 8, 5  # most that a notebook shows of each
_SECONDS = 0.1  # between two pictures of a notebook's display


class Screen(abc.ABC):
    """Shows bars while they are there, and lines that stay.

    Attributes:
        live: Whether bars are seen.
    """

    live: bool = True

    @abc.abstractmethod
    def open(self) -> None:
        """Begin to show."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave what stays."""

    @abc.abstractmethod
    def add(self, label: str, total: int | None, completed: int = 0) -> int:
        """Return the number of a new bar; without a total it only shows that something goes on."""

    @abc.abstractmethod
    def update(
        self,
        bar: int,
        *,
        completed: int | None = None,
        total: int | None = None,
        state: str | None = None,
        now: bool = False,
    ) -> None:
        """Change what is given of a bar; `now`, if the next change may be long in coming."""

    @abc.abstractmethod
    def remove(self, bar: int) -> None:
        """Take a bar away."""

    @abc.abstractmethod
    def say(self, line: str) -> None:
        """Show a line."""


class Nowhere(Screen):
    """Shows nothing: there is neither a notebook nor a terminal."""

    live = False

    def open(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def add(self, label: str, total: int | None, completed: int = 0) -> int:
        """Do nothing."""
        return 0

    def update(self, bar: int, **changes: Any) -> None:
        """Do nothing."""

    def remove(self, bar: int) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""


class Terminal(Screen):
    """Rich's bars on a console; on one that is no terminal, lines alone."""

    def __init__(self, console: Console) -> None:
        """Take the console."""
        self._console = console
        self.live = console.is_terminal
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

    def open(self) -> None:
        """Start the bars."""
        if self.live:  # bars that are off end in an empty line all the same, with Rich before 14.1
            self._bars.start()

    def close(self) -> None:
        """Take the bars away."""
        if self.live:
            self._bars.stop()

    def add(self, label: str, total: int | None, completed: int = 0) -> int:
        """Add a bar."""
        return self._bars.add_task(label, total=total, completed=completed, state="")

    def update(
        self,
        bar: int,
        *,
        completed: int | None = None,
        total: int | None = None,
        state: str | None = None,
        now: bool = False,
    ) -> None:
        """Change it."""
        fields: dict[str, Any] = {} if state is None else {"state": state}
        self._bars.update(TaskID(bar), completed=completed, total=total, **fields)

    def remove(self, bar: int) -> None:
        """Remove it."""
        self._bars.remove_task(TaskID(bar))

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        # What a user has named may look like Rich's markup, and is none.
        self._console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


@dataclass
class _Bar:
    label: str
    total: int | None
    completed: int
    state: str = ""
    since: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> str:
        return f"{self.completed:,}" + ("" if self.total is None else f" of {self.total:,}")

    @property
    def seconds(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.since), 60)
        return f"{minutes}:{seconds:02}"

    @property
    def element(self) -> str:
        ratio = f' value="{self.completed}" max="{self.total}"' if self.total else ""
        bar = f"<progress{ratio}></progress>"
        texts = (html.escape(text) for text in (self.count, self.seconds, self.state))
        cells = "".join(f"<td>{cell}</td>" for cell in (html.escape(self.label), bar, *texts))
        return f"<tr>{cells}</tr>"


class Notebook(Screen):
    """One output of the cell that is at work, renewed as things go on.

    By the protocol of Jupyter itself, which needs no widgets: what is shown last stays in the
    notebook's file. It takes no thread, and prints of the cell come out where they belong.
    """

    def __init__(self, display: Any) -> None:
        """Take IPython's ``display``."""
        self._display = display
        self._handle: Any = None
        self._numbers = itertools.count()
        self._bars: dict[int, _Bar] = {}
        self._lines: list[str] = []
        self._shown = 0.0
        self._lock = threading.RLock()

    def open(self) -> None:
        """Begin an output."""
        with self._lock:
            self._bars, self._lines, self._handle = {}, [], None
            self._show(now=True)

    def close(self) -> None:
        """Leave the lines and the bars that are there."""
        with self._lock:
            self._show(now=True)
            self._handle = None

    def add(self, label: str, total: int | None, completed: int = 0) -> int:
        """Add a bar."""
        with self._lock:
            number = next(self._numbers)
            self._bars[number] = _Bar(label, total, completed)
            self._show()
            return number

    def update(
        self,
        bar: int,
        *,
        completed: int | None = None,
        total: int | None = None,
        state: str | None = None,
        now: bool = False,
    ) -> None:
        """Change it."""
        with self._lock:
            changed = self._bars[bar]
            changed.completed = changed.completed if completed is None else completed
            changed.total = changed.total if total is None else total
            changed.state = changed.state if state is None else state
            self._show(now=now)

    def remove(self, bar: int) -> None:
        """Remove it."""
        with self._lock:
            del self._bars[bar]
            self._show()

    def say(self, line: str) -> None:
        """Add a line; the last ones are shown."""
        with self._lock:
            self._lines.append(line)
            self._show()

    def _show(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._shown < _SECONDS:
            return
        self._shown = time.monotonic()
        shown = {"text/html": self._html(), "text/plain": self._text()}
        if self._handle is None:
            self._handle = self._display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def _parts(self) -> tuple[list[str], list[_Bar], list[str]]:
        """Return the last lines and the first bars, and how many more there are."""
        earlier, bars = len(self._lines) - _LINES, list(self._bars.values())
        head = [f"{earlier:,} lines before"] if earlier > 0 else []
        tail = [f"and {len(bars) - _BARS:,} more at work"] if len(bars) > _BARS else []
        return [*head, *self._lines[-_LINES:]], bars[:_BARS], tail

    def _html(self) -> str:
        lines, bars, tail = self._parts()
        parts = [f"<div>{html.escape(line)}</div>" for line in lines]
        if bars:
            rows = "".join(bar.element for bar in bars)
            parts.append(f'<table style="font-variant-numeric:tabular-nums">{rows}</table>')
        parts += [f"<div>{html.escape(line)}</div>" for line in tail]
        return f"<div>{''.join(parts)}</div>"

    def _text(self) -> str:
        lines, bars, tail = self._parts()
        rows = [f"{bar.label}  {bar.count}  {bar.seconds}  {bar.state}".rstrip() for bar in bars]
        return "\n".join([*lines, *rows, *tail])


def screen_here() -> Screen:
    """Return where this process can show something: a notebook, else standard error's terminal."""
    ipython = sys.modules.get("IPython")  # a notebook's process has imported it
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is not None:
        return Notebook(sys.modules["IPython"].display.display)
    console = Console(stderr=True)
    return Terminal(console) if console.is_terminal else Nowhere()
