"""Work whose items note what they see, and die or raise on purpose: importable on Ray's nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ift_tune.base.errors import UsageError
from ift_tune.base.interrupt import Interrupt
from ift_tune.joint.callbacks import Callback
from ift_tune.search.work import FolderWork, Work, Worker

STEPS = ("1", "2", "3")


@dataclass(frozen=True)
class Notes(FolderWork):
    """Each item writes three files into its folder, one after the other, and tells of each.

    Attributes:
        place: Where the folders are kept.
        count: How many items there are.
        fate: What befalls item 1 before its second file.
    """

    place: Path
    count: int
    fate: str = ""

    wanted_device = "cpu"

    def do_item(
        self,
        number: int,
        folder: Path,
        *,
        device: str,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Write what is missing; each file names those that were there when this process came."""
        there = " ".join(sorted(path.name for path in folder.iterdir() if path.name in STEPS))
        for step in STEPS:
            if not (folder / step).exists():
                if number == 1 and step == "2" and not there:
                    self._meet_fate()
                (folder / step).write_text(f"{device} after: {there}")
                on_done(int(step))

    def _meet_fate(self) -> None:
        if self.fate == "death":
            os._exit(9)
        if self.fate == "usage error":
            raise UsageError("give it something better")
        if self.fate == "exception":
            raise ZeroDivisionError("one by nothing")
        if self.fate == "sleep":
            time.sleep(600)

    def unfinished(self) -> list[int]:
        return [n for n in range(self.count) if not (self.folder(n) / "finished").exists()]

    def folder(self, number: int) -> Path:
        path = self.place / str(number)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, number: int) -> None:
        (self.folder(number) / "finished").touch()

    def name_of(self, number: int) -> str:
        return f"item {number}"

    def on(self, device: str) -> Work:
        return self

    def do(
        self,
        worker: Worker,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Not what Ray calls."""
        raise AssertionError

    def left_by(self, worker: Worker) -> int | None:
        return None

    def give_up(self, number: int) -> None:
        """Not what Ray calls."""
        raise AssertionError
