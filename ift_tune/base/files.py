"""Files that a kill leaves whole: tables, and checkpoints, which load without executing code."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ift_tune.base.errors import CheckpointError, UsageError

if TYPE_CHECKING:  # a report writes tables without PyTorch, which is imported where it is used
    import pandas as pd
    from torch import Tensor

FORMAT = 2
"""Of checkpoints."""


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
    """Return a table as CSV, the same bytes on every system."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as parquet, its ``attrs`` included."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically."""
    import torch

    content = {"format": FORMAT, "state": state}
    write_atomically(Path(path), lambda file: torch.save(content, file))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the tensors' values, by which two copies are known to be equal."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a state onto the CPU.

    Raises:
        CheckpointError: If the file is damaged, of another version, or holds more than data.
        OSError: If there is no such file, or it cannot be read.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than data; "
            "delete it to start that trial again"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads format {FORMAT}")
    state: dict[str, Any] = content["state"]
    return state
