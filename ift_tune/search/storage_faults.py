"""A study's storage that is lost, full or torn: said as what it is, and mended where it can be."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from optuna.exceptions import StorageInternalError
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import SQLAlchemyError

from ift_tune.base.errors import EnvironmentFaultError, IFTTuneError
from ift_tune.base.faults import as_fault, writing
from ift_tune.base.files import content_digest, damaged, reading

_DIGEST = "digest"  # the last entry of a journal's line
_BLOCK = 1 << 16

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def using_storage(name: str = "the study's storage") -> Iterator[None]:
    """Say of a storage that cannot be read or written that it is no fault of the program.

    Args:
        name: What to call it.

    Raises:
        EnvironmentFaultError: In place of what the storage raised.
    """
    try:
        yield
    except EnvironmentFaultError:
        raise
    except (OSError, SQLAlchemyError, StorageInternalError) as error:
        raise as_fault(f"{name} cannot be used", error) from error


class SignedJournal(JournalFileBackend):
    """A journal whose lines each have a digest; those of other programs and versions have none."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines."""
        super().append_logs([{**log, _DIGEST: _digest(log)} for log in logs])

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Read lines from a number on.

        Raises:
            UsageError: If one is another than was written.
        """
        for number, log in enumerate(super().read_logs(log_number_from), log_number_from + 1):
            digest = log.pop(_DIGEST, None)
            if digest not in (None, _digest(log)):
                raise damaged(Path(self._file_path), f"another {_DIGEST} in line {number}")
            yield log


def _digest(log: dict[str, Any]) -> str:
    return content_digest(json.dumps(log).encode())


@contextlib.contextmanager
def reading_study(name: str) -> Iterator[None]:
    """Say of a study that cannot be made sense of that its storage is damaged.

    Args:
        name: What to call it.

    Raises:
        UsageError: In place of what Optuna's storages raise at values that they did not write.
        EnvironmentFaultError: If the storage cannot be used.
    """
    try:
        with using_storage(name):
            yield
    except IFTTuneError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise damaged(name, error) from error


def mend_tail(journal: Path, lock: BaseJournalFileLock) -> None:
    """Cut off the half-written last line of a journal, which its writer was killed at.

    It says nothing: Optuna reads whole lines alone. The next line would be appended to it, and
    neither could be read.

    Args:
        journal: The file, which need not be there.
        lock: Of its writers: one that is alive has no half line under it.

    Raises:
        UsageError: If the last whole line is damaged, which Optuna would pass over.
    """
    if not journal.exists():
        return
    lock.acquire()
    try:
        with writing(journal), journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            whole = _end_of_lines(file, size)
            if whole < size:
                _log.warning(
                    "%s ended in half a line, of a process that was killed: it is cut off", journal
                )
                file.truncate(whole)
            start = _end_of_lines(file, max(0, whole - 1))
            file.seek(start)
            if whole:
                with reading(journal):
                    json.loads(file.read(whole - start))
    finally:
        lock.release()


def _end_of_lines(file: BinaryIO, size: int) -> int:
    """Return where the last whole line of a file ends."""
    position = size
    while position:
        start = max(0, position - _BLOCK)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
