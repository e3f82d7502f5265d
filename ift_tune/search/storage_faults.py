"""A study's storage that is lost, full or torn: said as what it is, and mended where it can be."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from optuna.exceptions import StorageInternalError
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import SQLAlchemyError

from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.base.faults import as_fault, writing

_BLOCK = 1 << 16

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def using_storage() -> Iterator[None]:
    """Say of a storage that cannot be read or written that it is no fault of the program.

    Raises:
        EnvironmentFaultError: In place of what the storage raised.
    """
    try:
        yield
    except EnvironmentFaultError:
        raise
    except (OSError, SQLAlchemyError, StorageInternalError) as error:
        raise as_fault("the study's storage cannot be used", error) from error


def mend_tail(journal: Path, lock: BaseJournalFileLock) -> None:
    """Cut off the half-written last line of a journal, which its writer was killed at.

    It says nothing: Optuna reads whole lines alone. The next line would be appended to it, and
    neither could be read.

    Args:
        journal: The file, which need not be there.
        lock: Of its writers: one that is alive has no half line under it.
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
