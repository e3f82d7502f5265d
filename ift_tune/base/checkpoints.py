"""Checkpoints: data alone, whole or refused, with the one before at hand."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import CheckpointError
from ift_tune.base.files import write_atomically

FORMAT = 3
"""Of what is written; format 2 had no digest."""

_READ = (2, 3)
_MARK = b"ift_tune blake2b "
_DIGEST = 32  # hexadecimal digits
_END = b"PK\x05\x06"  # of the record that ends a zip file, before its comment

_log = logging.getLogger(__name__)


def save_checkpoint(
    path: str | os.PathLike[str], state: dict[str, Any], *, generations: bool = False
) -> None:
    """Save tensors and plain values atomically, under a digest of the whole file.

    PyTorch's files are zip files, whose own comment holds the digest, so that `torch.load` reads
    them as ever.

    Args:
        path: The file.
        state: Tensors and plain values.
        generations: Whether what was there is kept beside it, see `previous`.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "state": state}, buffer)
    content = buffer.getvalue()
    comment = _MARK + _digest(content)
    signed = content[:-2] + len(comment).to_bytes(2, "little") + comment
    file = Path(path)
    write_atomically(file, signed, previous(file) if generations else None)


def previous(path: Path) -> Path:
    """Return where the generation before a checkpoint is kept."""
    return path.with_name(f"previous-{path.name}")


def generations(path: Path) -> list[Path]:
    """Return the generations of a checkpoint that are there, the latest first."""
    return [file for file in (path, previous(path)) if file.exists()]


def drop_generations(path: Path) -> None:
    """Remove all generations of a checkpoint."""
    for file in generations(path):
        file.unlink()


def load_latest(path: Path, load: Callable[[Path], object]) -> Path | None:
    """Load the latest whole generation of a checkpoint; a damaged one is named in a warning.

    Args:
        path: The checkpoint.
        load: Is given the file; a `CheckpointError` of it says that the file is no good.

    Returns:
        What was loaded; None if there is no checkpoint.

    Raises:
        CheckpointError: If there are some, and none is whole.
    """
    found = generations(path)
    for file in found:
        try:
            load(file)
        except CheckpointError as error:
            if file == found[-1]:
                raise
            _log.warning("%s; going on from %s, the one before", error, previous(path).name)
        else:
            return file
    return None


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a state onto the CPU.

    Raises:
        CheckpointError: If the file is damaged, of another version, or holds more than data.
        OSError: If there is no such file, or it cannot be read.
    """
    data = Path(path).read_bytes()
    signed = _is_signed(data)
    try:
        if not signed:
            _require_whole_members(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of damaged files raise anything
        raise _damaged(path) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in _READ:
        raise CheckpointError(f"{path} has format {found}, this version reads format {FORMAT}")
    if found == FORMAT and not signed:
        raise _damaged(path)
    state: dict[str, Any] = content["state"]
    return state


def _is_signed(data: bytes) -> bool:
    """Return whether a file ends in the digest of what stands before it."""
    comment = data[-len(_MARK) - _DIGEST :]
    content = data[: -len(comment)]
    return (
        comment[: len(_MARK)] == _MARK
        and content[-22:-18] == _END
        and content[-2:] == len(comment).to_bytes(2, "little")
        and comment[len(_MARK) :] == _digest(content)
    )


def _digest(content: bytes) -> bytes:
    """Return the digest of a zip file, whatever length it states of its comment."""
    return hashlib.blake2b(content[:-2], digest_size=_DIGEST // 2).hexdigest().encode()


def _require_whole_members(data: bytes) -> None:
    """Raise unless the checksums of a zip file's members hold, which PyTorch does not look at."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if (member := archive.testzip()) is not None:
            raise ValueError(f"{member} is damaged")


def _damaged(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a checkpoint: it is damaged, or holds more than data; "
        "delete it to start that trial again"
    )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the tensors' values, by which two copies are known to be equal."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
