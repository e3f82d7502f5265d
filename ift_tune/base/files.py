"""Files that a kill leaves whole, tables among them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pandas as pd


def write_atomically(path: Path, write: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a kill leaves either the old content or the new, never a part.

    Args:
        path: The file.
        write: Its content, or what writes it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(stem: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV and parquet.

    Args:
        stem: The path of both files without their ending.
        table: The table; its index is not written.
    """
    write_atomically(stem.with_name(f"{stem.name}.csv"), csv_bytes(table))
    write_atomically(stem.with_name(f"{stem.name}.parquet"), parquet_bytes(table))


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as CSV, the same bytes on every system."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as parquet, its ``attrs`` included."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
