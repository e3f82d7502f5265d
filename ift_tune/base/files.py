"""Files that neither a kill nor a power cut leaves half-written, and readers that name damage."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from ift_tune.base.cells import guarded_table
from ift_tune.base.errors import IFTTuneError, UsageError
from ift_tune.base.faults import as_fault, surroundings, writing

if TYPE_CHECKING:  # whoever reads JSON does without
    import pandas as pd


_TEMPORARY = ".tmp"
_LONG = 3600.0  # seconds; no file is written for as long
_DIGEST, _DIGITS = "digest", 32  # the last entry of a JSON file, and its hexadecimal digits
_SHOWN = 200  # characters of a reader's own words
_PARQUET = b"PAR1"
_ATTRIBUTES = "PANDAS_ATTRS"  # where pandas looks for a table's attributes in the file
_MARK = b"ift_tune blake2b "
_FLEETING = ContextVar("_FLEETING", default=False)


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


@contextlib.contextmanager
def fleeting() -> Iterator[None]:
    """Do not wait for the disk inside: nobody will want these files after a power cut."""
    token = _FLEETING.set(True)
    try:
        yield
    finally:
        _FLEETING.reset(token)


def flush(file: IO[Any]) -> None:
    """Bring what was written into a file to the disk."""
    file.flush()
    _sync(file.fileno())


def _sync(handle: int) -> None:
    if not _FLEETING.get():
        os.fsync(handle)


def _flush_names(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can: a renaming is one of them."""
    with contextlib.suppress(OSError):  # Windows opens no folder, and needs none of this
        handle = os.open(folder, os.O_RDONLY)
        try:
            _sync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of whatever goes wrong inside that a file is damaged: its readers raise anything.

    Raises:
        UsageError: In place of what was raised, unless that is an error of this package.
        EnvironmentFaultError: If the environment let go.
    """
    try:
        with surroundings(f"reading {path}"):
            yield
    except IFTTuneError:
        raise
    except PermissionError as error:
        raise as_fault(f"{path} cannot be read", error) from error
    except Exception as error:
        raise damaged(path, error) from error


def damaged(path: Path | str, error: Exception | str) -> UsageError:
    """Return what to raise where a file cannot be read as what it is."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UsageError(
        f"{path} is damaged: put a copy of it in its place, or name another directory, got "
        f"{(reason or type(error).__name__)[:_SHOWN]}"
    )


def content_digest(content: bytes) -> str:
    """Return by what the content of a file is known."""
    return hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest()


def plain_json(content: Mapping[str, Any]) -> bytes:
    """Return plain values as JSON; NaN, which is none, is refused."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def signed_json(content: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file whose last entry is a digest of the others."""
    return _json({**content, _DIGEST: content_digest(_json(content))})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file of ours holds, without its digest.

    Those of earlier versions have none.

    Raises:
        UsageError: If it is damaged.
    """
    with reading(path):
        return parse_json(path.read_bytes())


def parse_json(text: bytes | str) -> dict[str, Any]:
    """Return what `signed_json` has made a text of.

    Raises:
        ValueError: If it is no such text, or another one than was written.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(  # noqa: TRY004 (of the text, which is what was given)
            f"a {type(content).__name__} where names with values should be"
        )
    digest = content.pop(_DIGEST, None)
    if digest is None:
        last = next(reversed(content.values()), None)
        signed = isinstance(last, str) and re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", last) is not None
    else:
        signed = True
    if signed and digest != content_digest(_json(content)):
        raise ValueError(f"another {_DIGEST} than that of its content")
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
    return guarded_table(_bare(table)).to_csv(index=False, lineterminator="\n").encode()


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as parquet, its ``attrs`` included, with a digest of the whole.

    It stands between data and footer, where readers, who begin at the end, do not look.
    """
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.Table.from_pandas(_bare(table), preserve_index=False)
    attributes = {_ATTRIBUTES: json.dumps(table.attrs)} if table.attrs else {}
    buffer = io.BytesIO()
    parquet.write_table(
        rows.replace_schema_metadata({**rows.schema.metadata, **attributes}),
        buffer,
        write_page_checksum=True,
    )
    content = buffer.getvalue()
    data = content[: _data_end(content)]
    footer = content[len(data) :]
    return data + _MARK + content_digest(content).encode() + footer


def _bare(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without its ``attrs``, which pandas copies deeply for each column it takes."""
    bare = table.copy(deep=False)
    bare.attrs = {}
    return bare


def read_parquet(path: Path) -> pd.DataFrame:
    """Return a table that was written as parquet, by an earlier version without a digest too.

    Raises:
        UsageError: If it is damaged.
    """
    import pandas as pd

    with reading(path):
        content = path.read_bytes()
        end = _data_end(content)
        start = end - len(_MARK) - _DIGITS
        if content[start:end].startswith(_MARK):
            whole = content[:start] + content[end:]
            if content[end - _DIGITS : end] != content_digest(whole).encode():
                raise ValueError(f"another {_DIGEST} than that of its content")
        return pd.read_parquet(io.BytesIO(content), page_checksum_verification=True)


def _data_end(content: bytes) -> int:
    """Return where the footer of a parquet file begins: its length stands at the end."""
    tail = len(_PARQUET) + 4
    if len(content) <= tail or not content.endswith(_PARQUET):
        raise ValueError("the end of a parquet file is missing")
    end = len(content) - tail - int.from_bytes(content[-tail : -len(_PARQUET)], "little")
    if end < len(_PARQUET):
        raise ValueError("the footer of a parquet file is missing")
    return end
