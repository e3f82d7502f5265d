"""Files that neither a kill nor a power cut leaves half-written, and readers that name damage."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from ift_tune.base.cells import guarded_table
from ift_tune.base.errors import UsageError
from ift_tune.base.faults import writing

if TYPE_CHECKING:  # whoever reads JSON does without
    import pandas as pd


_TEMPORARY = ".tmp"
_LONG = 3600.0  # seconds; no file is written for as long


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
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


def drop_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have half-written in a folder and those below.

    Args:
        folder: One in which processes of this machine write, if any.
    """
    for path in folder.rglob(f".*{_TEMPORARY}"):
        process = path.name.removesuffix(_TEMPORARY).rpartition(".")[2]
        if process.isascii() and process.isdigit() and _is_over(int(process), path):
            with contextlib.suppress(OSError):  # somebody else has removed it
                path.unlink()


def _is_over(process: int, path: Path) -> bool:
    """Return whether the process that wrote a file is no more."""
    if os.name == "nt":  # where asking for a process by a signal would end it
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _LONG
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or no process can have that number
        return False
    return False


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
