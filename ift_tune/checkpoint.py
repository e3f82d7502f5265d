"""Checkpoints: written atomically, versioned, and loaded without executing code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ift_tune.errors import CheckpointError

FORMAT = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves either the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save({"format": FORMAT, "state": state}, temporary)
    temporary.replace(path)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a state onto the CPU.

    Raises:
        CheckpointError: If the file is damaged, of another version, or holds more than data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({error}); delete it to start that trial again"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads format {FORMAT}")
    state: dict[str, Any] = content["state"]
    return state
