"""Where an Optuna study is kept, and how processes that share it keep out of each other's way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import SQLAlchemyError

from ift_tune.base.errors import UsageError

JOURNAL = "journal://"


class OwnJournalLock(JournalFileOpenLock):
    """Locks a journal that this package alone writes to, by a lock that dies with its process.

    Optuna's own locks are files, made to work on any file system: one left by a killed process
    holds up everybody else for half a minute.
    """

    def __init__(self, journal: Path) -> None:
        """Take the journal's path."""
        super().__init__(str(journal))
        self._held = FileLock(f"{journal}.flock", poll_interval=0.01)

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._held.acquire()
        return True

    def release(self) -> None:
        """Give it back."""
        self._held.release()


def open_storage(storage: str | BaseStorage | None, directory: Path) -> BaseStorage:
    """Return an opened storage: by default a journal in the run directory.

    Raises:
        UsageError: If a URL cannot be opened.
    """
    if isinstance(storage, BaseStorage):
        return storage
    if storage is None:
        path = directory / "study.journal"
        return JournalStorage(JournalFileBackend(str(path), lock_obj=OwnJournalLock(path)))
    try:
        if storage.startswith(JOURNAL):
            return JournalStorage(JournalFileBackend(storage.removeprefix(JOURNAL)))
        return optuna.storages.get_storage(storage)
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise UsageError(
            f"the storage {storage} cannot be opened ({str(error).splitlines()[0]}): give "
            "sqlite:///FILE.db, journal:///DIR/FILE in a folder that exists, or a database's URL"
        ) from error


def asking_lock(storage: str | BaseStorage | None, directory: Path) -> FileLock:
    """Return the lock under which new trials are counted and begun, so that none is too many.

    It lies beside the storage where that is a file, so that all processes on it find it, and in
    the run directory otherwise.
    """
    path = directory / "study"
    if isinstance(storage, str):
        for prefix in (JOURNAL, "sqlite:///"):
            if storage.startswith(prefix):
                path = Path(storage.removeprefix(prefix))
    return FileLock(f"{path}.asking", poll_interval=0.01)


def check_shareable(storage: str | BaseStorage | None) -> None:
    """Raise a `UsageError` if other processes cannot reach the storage."""
    if isinstance(storage, InMemoryStorage):
        raise UsageError("several workers cannot share a storage in memory: give a URL, or none")


def storage_identity(storage: str | BaseStorage | None) -> str | None:
    """Return what tells one storage from another, without the password a URL may hold."""
    if isinstance(storage, str):
        return hashlib.sha256(storage.encode()).hexdigest()[:16]
    return None if storage is None else type(storage).__name__


def quiet_optuna() -> None:
    """Let Optuna log warnings only: for programs that show the progress themselves."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
