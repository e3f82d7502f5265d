"""The folder of one trial: what is constant over it, its rows, what it leaves at its end.

``trial-00003/`` holds ``trial.json`` (the constants, and how the trial ended), ``steps.csv`` (one
line an outer step, appended and flushed) and, while the trial runs, ``checkpoint.pt``.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from ift_tune.base.files import write_atomically

Row: TypeAlias = Mapping[str, Any]

_FOLDERS = ("trial-*", "cells/*/trial-*")  # of a run, and of the searches of a comparison


class TrialRecord:
    """The folder of one trial; it is made when something is written into it."""

    def __init__(self, path: Path) -> None:
        """Take the folder's path."""
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self._steps = path / "steps.csv"
        self._columns: list[str] | None = None

    @property
    def number(self) -> int:
        """The trial's number in its run."""
        return int(self.path.name.rpartition("-")[2])

    def describe(self, facts: Row) -> None:
        """Write what is constant over the trial, and how it ended; replaces what was there."""
        self.write("trial.json", plain_json(facts))

    def facts(self) -> dict[str, Any]:
        """Return what `describe` wrote last; empty before."""
        path = self.path / "trial.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

    def write(self, name: str, content: bytes) -> None:
        """Write a file into the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)

    @property
    def columns(self) -> list[str]:
        """What the rows hold so far."""
        if self._columns is None:
            self._columns = self._header()
        return self._columns

    def fill(self, values: Row) -> None:
        """Write constants into the rows so far, before they change in the middle of the trial."""
        table = self.steps()
        if len(table):
            new = {name: value for name, value in values.items() if name not in self.columns}
            self._rewrite(table.assign(**new), [*self.columns, *new])

    def append(self, row: Row) -> None:
        """Append one outer step; a column not seen before is added to the earlier rows, empty."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._rewrite(self.steps(), [*self.columns, *new])
        with self._steps.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(_exact(row))

    def truncate(self, last_step: int) -> None:
        """Drop rows after `last_step`, and a torn last line: a resumed trial redoes them."""
        table = self.steps()
        self._rewrite(table[table["step"] <= last_step] if len(table) else table, self._header())

    def steps(self) -> pd.DataFrame:
        """Return the steps written so far, without a half-written last line."""
        if not self._steps.exists():
            return pd.DataFrame()
        text = self._steps.read_text()
        text = text[: text.rfind("\n") + 1]
        if not text:
            return pd.DataFrame()
        return pd.read_csv(io.BytesIO(text.encode()), engine="pyarrow")

    def _header(self) -> list[str]:
        if not self._steps.exists():
            return []
        with self._steps.open(newline="") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, table: pd.DataFrame, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        buffer = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(buffer, self._columns, lineterminator="\n")
            writer.writeheader()
            for row in table.to_dict("records"):
                writer.writerow(_exact(row))
        self.write(self._steps.name, buffer.getvalue().encode())


def records_in(path: Path) -> list[TrialRecord]:
    """Return the records of all trials of a run so far, in order, those of a comparison too."""
    folders = [p for pattern in _FOLDERS for p in sorted(path.glob(pattern)) if p.is_dir()]
    return [TrialRecord(folder) for folder in folders]


def plain_json(content: Row) -> bytes:
    """Return the text of a JSON file; NaN, which is none, is refused."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _exact(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Write floats so that they are read back to the bit, and missing values as nothing."""
    return {
        key: None
        if value is None or (isinstance(value, float) and math.isnan(value))
        else repr(float(value))
        if isinstance(value, float)
        else value
        for key, value in row.items()
    }
