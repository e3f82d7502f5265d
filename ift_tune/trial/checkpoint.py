"""Checkpoints: written atomically, versioned, and loaded without executing code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import CheckpointError
from ift_tune.base.files import write_atomically

FORMAT = 2


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically."""
    content = {"format": FORMAT, "state": state}
    write_atomically(Path(path), lambda file: torch.save(content, file))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the tensors' values, by which two copies are known to be equal."""
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
