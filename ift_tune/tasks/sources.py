"""Where a task's data comes from: declared without PyTorch, read when a problem is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataSet:
    """How to get a data set.

    Attributes:
        stand_in: Embedded data of the same form, for trying a task out without any files; of a
            data set that is embedded itself, all there is.
        read: ``read(root, download)`` reads it from the data root; None if it is embedded.
        layout: What has to lie under the data root; empty if nothing.
    """

    stand_in: Callable[[], Any]
    read: Callable[[Path, bool], Any] | None = None
    layout: str = ""
