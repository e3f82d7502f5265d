"""Files that neither a kill nor a power cut leaves half-written, and readers that name damage."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from ift_tune.base.cells import guarded_table
from ift_tune.base.errors import UsageError
from ift_tune.base.faults import writing

if TYPE_CHECKING:  # whoever reads JSON does without
    import pandas as pd


def write_atomically(
    path: Path, write: bytes | Callable[[BinaryIO], object], previous: Path | None = None
) -> None:
    """Write a file so that a kill or a power cut leaves either the old content or the new.

    Args:
        path: The file.
        write: Its content, or what writes it.
        previous: Where the old content is kept, in place of what is there; None: nowhere.

    Raises:
        EnvironmentFaultError: If the system does not let it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                if callable(write):
                    write(file)
                else:
                    file.write(write)
                flush(file)
            if previous is not None and path.exists():
                path.replace(previous)
            temporary.replace(path)
            _flush_names(path.parent)
        finally:
            with contextlib.suppress(OSError):  # of a folder that is gone, say
                temporary.unlink(missing_ok=True)


def flush(file: IO[Any]) -> None:
    """Bring what was written into a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can: a renaming is one of them."""
    with contextlib.suppress(OSError):  # Windows opens no folder, and needs none of this
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def damaged(path: Path, error: Exception) -> UsageError:
    """Return what to raise where a file cannot be read as what it is."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UsageError(
        f"{path} is damaged: put a copy of it in its place, or name another directory, got {reason}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file of ours holds.

    Raises:
        UsageError: If it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, ValueError(f"a {type(content).__name__} where settings should be"))
    return content


def write_table(stem: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV and parquet.

    Args:
        stem: The path of both files without their ending.
        table: The table; its index is not written.
    """
    write_atomically(stem.with_name(f"{stem.name}.csv"), csv_bytes(table))
    write_atomically(stem.with_name(f"{stem.name}.parquet"), parquet_bytes(table))


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as CSV, the same bytes on every system, without a formula in it."""
    return guarded_table(table).to_csv(index=False, lineterminator="\n").encode()


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as parquet, its ``attrs`` included."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
