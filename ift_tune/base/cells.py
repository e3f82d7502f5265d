"""Texts in CSV files, written so that no spreadsheet takes one for a formula, and read back.

A text that begins as a formula does gets an apostrophe before it, as spreadsheets mark texts; one
that has it already gets another, so that what is read is what was written. Numbers are no texts and
stay as they are: a column of them may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # whoever writes other files does without
    import pandas as pd

_MARK = "'"
_BEGINNINGS = tuple("=+-@\t\r\n＝＋－＠")  # full-width ones too, which some spreadsheets take


def guarded(cell: Any) -> Any:
    """Return a cell of a CSV file for a value: a text that begins as a formula gets a mark.

    Example:
        >>> from ift_tune.base.cells import guarded
        >>> [guarded(value) for value in ("=1+1", "-2", -2.0, "a-b", "'=")]
        ["'=1+1", "'-2", -2.0, 'a-b', "''="]
    """
    return f"{_MARK}{cell}" if isinstance(cell, str) and _begins(cell) else cell


def unguarded(cell: Any) -> Any:
    """Return the value of a cell that `guarded` made; any other as it is."""
    if isinstance(cell, str) and cell.startswith(_MARK) and _begins(cell):
        return cell.removeprefix(_MARK)
    return cell


def guarded_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with all texts, and the names of its columns, guarded."""
    return _each(table, guarded)


def unguarded_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return what `guarded_table` was given."""
    return _each(table, unguarded)


def _begins(cell: str) -> bool:
    return cell.lstrip(_MARK).startswith(_BEGINNINGS)


def _each(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    new = table.copy(deep=False)
    for name, column in table.items():
        if column.dtype.kind == "O":  # of texts and of objects
            texts = {cell for cell in column if isinstance(cell, str)}
            changed = {cell: change(cell) for cell in texts if change(cell) != cell}
            if changed:
                new[name] = column.map(partial(_changed, changed))
    new.columns = [change(name) for name in table.columns]
    return new


def _changed(to: Mapping[str, str], cell: Any) -> Any:
    return to.get(cell, cell) if isinstance(cell, str) else cell
