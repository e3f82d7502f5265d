"""Checkpoints: data alone, whole or refused, with the one before at hand."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ift_tune.base.errors import CheckpointError, IFTTuneError
from ift_tune.base.faults import surroundings
from ift_tune.base.files import write_atomically

if TYPE_CHECKING:  # a report reads records without PyTorch, which is imported where it is used
    from torch import Tensor

FORMAT = 3
"""Of what is written; format 2 had no digest."""

_READ = (2, 3)
_MARK = b"ift_tune blake2b "
_DIGEST = 32  # hexadecimal digits
_LENGTH = 2  # bytes at the end of a zip file that say how long its comment is
_CHUNK = 1 << 20
_SHOWN = 200  # characters of a reader's own words
_MEND = (
    "put a copy of it in its place, or, if it is a running trial's, delete it to start that trial "
    "again"
)

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
    content = {"format": FORMAT, "state": state}
    file = Path(path)
    write_atomically(file, lambda raw: _sign(content, raw), previous(file) if generations else None)


def _sign(content: dict[str, Any], raw: BinaryIO) -> None:
    """Write a zip file with the digest in its comment."""
    import torch

    signed = _Signed(raw)
    try:
        torch.save(content, signed)  # type: ignore[arg-type]
    except RuntimeError:
        if signed.error is not None:  # which PyTorch's writer turns into one of its own
            raise signed.error from None
        raise
    comment = _MARK + signed.digest()
    raw.seek(-_LENGTH, io.SEEK_END)
    raw.write(len(comment).to_bytes(_LENGTH, "little") + comment)


class _Signed:
    """Passes on what is written, and digests it, all but the length of the comment at the end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._hash, self._last = raw, hashlib.blake2b(digest_size=_DIGEST // 2), b""
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if len(data) >= _LENGTH:  # nearly always, and then without a copy
            self._hash.update(self._last)
            self._hash.update(memoryview(data)[:-_LENGTH])
            self._last = bytes(data[-_LENGTH:])
        else:
            held = self._last + bytes(data)
            self._hash.update(held[:-_LENGTH])
            self._last = held[-_LENGTH:]
        try:
            return self._raw.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._raw.flush()

    def digest(self) -> bytes:
        return self._hash.hexdigest().encode()


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
        EnvironmentFaultError: If the environment let go.
        FileNotFoundError: If there is no such file.
    """
    import torch

    try:
        with surroundings(f"reading {path}"):
            if not (signed := _is_signed(Path(path))):
                _require_whole_members(Path(path))
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (IFTTuneError, FileNotFoundError):
        raise
    except Exception as error:  # the readers of damaged files raise anything
        raise _damaged(path) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in _READ:
        raise CheckpointError(f"{path} has format {found}, this version reads format {FORMAT}")
    if found == FORMAT and not signed:
        raise _damaged(path)
    state = content.get("state")
    if not isinstance(state, dict):
        raise _damaged(path)
    return state


@contextlib.contextmanager
def taking_over(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of a checkpoint from which something cannot be taken that it does not hold it.

    Raises:
        CheckpointError: In place of what the lack of an entry, or one of another kind, raises.
    """
    try:
        yield
    except IFTTuneError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # out of memory, say
        reason = " ".join(str(error).split())[:_SHOWN]
        raise CheckpointError(
            f"{path} does not hold what was saved ({type(error).__name__}: {reason}); {_MEND}"
        ) from error


def _is_signed(path: Path) -> bool:
    """Return whether a file ends in the digest of what stands before it."""
    length = len(_MARK) + _DIGEST
    with path.open("rb") as file:
        left = file.seek(0, io.SEEK_END) - length - _LENGTH
        if left < 0:
            return False
        file.seek(0)
        digest = hashlib.blake2b(digest_size=_DIGEST // 2)
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        expected = length.to_bytes(_LENGTH, "little") + _MARK + digest.hexdigest().encode()
        return file.read() == expected


def _require_whole_members(path: Path) -> None:
    """Raise unless the checksums of a zip file's members hold, which PyTorch does not look at."""
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise ValueError(f"{member} is damaged")


def _damaged(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a checkpoint: it is damaged, or holds more than data; {_MEND}"
    )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the tensors' values, by which two copies are known to be equal."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
