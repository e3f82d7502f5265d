"""Files that a kill leaves whole: tables, and checkpoints, which load without executing code."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ift_tune.base.errors import CheckpointError

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
