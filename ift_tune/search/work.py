"""What several processes share: numbered items of work, and the storage of a study."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileOpenLock, JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import SQLAlchemyError

from ift_tune.base.arguments import require_path, require_writable, shown
from ift_tune.base.errors import UsageError
from ift_tune.base.files import reading
from ift_tune.base.status import Outcome
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import MetaConfig
from ift_tune.search.storage_faults import SignedJournal, mend_tail
from ift_tune.trial.runner import Interrupt


class Worker(NamedTuple):
    """One of the processes that share some work.

    Attributes:
        session: A random name of the call that started it, such as one of `run_study`: what workers
            of earlier calls were at is free to be taken up.
        number: Which of the call's processes.
        dead: Numbers of the call's processes that have died: what they were at is free too.
    """

    session: str
    number: int = 0
    dead: frozenset[int] = frozenset()

    @property
    def mark(self) -> str:
        """The text with which a trial or a search is marked that this worker is at."""
        return f"{self.session}/{self.number}"

    def survives(self, mark: str) -> bool:
        """Return whether the worker of a mark may still be at work."""
        session, _, number = mark.partition("/")
        return session == self.session and int(number) not in self.dead


class Work(abc.ABC):
    """Numbered items, such as trials, that several processes take one after the other.

    Picklable: each process has a copy.
    """

    @abc.abstractmethod
    def on(self, device: str) -> Work:
        """Return the same work for a process that has this device."""

    @abc.abstractmethod
    def do(
        self,
        worker: Worker,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Take items and do them, until none is left.

        Args:
            worker: Which process this is.
            callbacks: Their hooks of the search are called; the work has those of the optimisation.
            interrupt: Looked at between outer steps.
            on_done: Called with the number of each item that is finished.

        Raises:
            Interrupted: If the user asked to stop; everything is saved.
            Exception: Whatever a problem raises.
        """

    @abc.abstractmethod
    def left_by(self, worker: Worker) -> int | None:
        """Return the item at which a worker has died, None if it was at none."""

    @abc.abstractmethod
    def name_of(self, number: int) -> str:
        """Return what messages call an item."""

    @abc.abstractmethod
    def give_up(self, number: int) -> None:
        """Record that an item has failed, as processes died at it again and again."""


class FolderWork(Work):
    """Work whose items need nothing but a folder each, which may be copied to another machine.

    Attributes:
        wanted_device: What the user asked for.
    """

    wanted_device: str

    @abc.abstractmethod
    def unfinished(self) -> list[int]:
        """Return the items that are still to do."""

    @abc.abstractmethod
    def folder(self, number: int) -> Path:
        """Return the folder of an item; it need not exist yet."""

    @abc.abstractmethod
    def do_item(
        self,
        number: int,
        folder: Path,
        *,
        device: str,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Do an item, or go on with it.

        Args:
            number: Which item.
            folder: Its folder, or a copy of it.
            device: Where trials run.
            callbacks: Their hooks of the search are called; the work has those of the optimisation.
            interrupt: Looked at between outer steps.
            on_done: Called with the number of each trial that is finished.

        Raises:
            Interrupted: If the user asked to stop.
            Exception: Whatever the problem raises.
        """

    @abc.abstractmethod
    def finish(self, number: int) -> None:
        """Record that an item is finished."""


class Relay(Callback):
    """Sends the calls of the hooks of the search to another process, which has the callbacks."""

    def __init__(self, send: Callable[[str, tuple[Any, ...]], object]) -> None:
        """Take what sends a hook's name and arguments."""
        self._send = send

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        """Send it."""
        self._send("on_trial_begin", (number, config, first_step))

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Send it."""
        self._send("on_trial_step", (number, row))

    def on_retraining(self, number: int, inner_steps: int) -> None:
        """Send it."""
        self._send("on_retraining", (number, inner_steps))

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Send it."""
        self._send("on_trial_end", (number, outcome))


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
        path = _own_journal(directory)
        return _open_journal(path, OwnJournalLock(path))
    check_storage(storage)
    try:
        if storage.startswith(JOURNAL):
            path = Path(storage.removeprefix(JOURNAL))
            return _open_journal(path, JournalFileSymlinkLock(str(path)))
        return optuna.storages.get_storage(storage)
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        raise UsageError(
            f"the storage {storage} cannot be opened ({str(error).splitlines()[0]}): give "
            "sqlite:///FILE.db, journal:///DIR/FILE in a folder that exists, or a database's URL"
        ) from error


def _open_journal(path: Path, lock: BaseJournalFileLock) -> JournalStorage:
    """Return the study's journal, whose last line may have been half-written.

    Raises:
        UsageError: If another line is damaged.
    """
    with reading(path):
        mend_tail(path, lock)
        return JournalStorage(SignedJournal(str(path), lock_obj=lock))


def check_storage(storage: object) -> None:
    """Raise a `UsageError` unless a storage can be what `open_storage` takes; opens nothing."""
    if storage is None or isinstance(storage, BaseStorage):
        return
    form = "sqlite:///FILE.db, journal:///DIR/FILE or a database's URL"
    if not isinstance(storage, str) or "://" not in storage or "\0" in storage:
        raise UsageError(f"storage must be an Optuna storage or {form}, got {shown(storage)}")
    if (file := _file_of(storage)) is None:
        return
    path = require_path("the storage's file", file)
    if not file or path.is_dir():
        raise UsageError(f"the storage must name a file, as in {form}, got {storage}")
    if not path.parent.is_dir():
        raise UsageError(f"the storage's folder {path.parent} is not there: make it, got {storage}")
    require_writable("the storage's folder", path.parent)


def _file_of(storage: str) -> str | None:
    """Return the file that a storage's URL names, None if it names none."""
    for prefix in (JOURNAL, "sqlite:///"):
        if storage.startswith(prefix):
            return storage.removeprefix(prefix)
    return None


def asking_lock(storage: str | BaseStorage | None, directory: Path) -> FileLock:
    """Return the lock under which trials are counted and asked for, so that none is too many.

    It lies beside the storage where that is a file, so that all processes on it find it, and in
    the run directory otherwise.
    """
    file = _file_of(storage) if isinstance(storage, str) else None
    path = directory / "study" if file is None else Path(file)
    return FileLock(f"{path}.asking", poll_interval=0.01)


def check_shareable(storage: str | BaseStorage | None) -> None:
    """Raise a `UsageError` if other processes cannot reach the storage."""
    if isinstance(storage, InMemoryStorage):
        raise UsageError("several workers cannot share a storage in memory: give a URL, or none")


def storage_name(storage: str | BaseStorage | None, directory: Path) -> str:
    """Return what messages call a storage: its file, where that is one."""
    if storage is None:
        return str(_own_journal(directory))
    file = _file_of(storage) if isinstance(storage, str) else None
    return "the study's storage" if file is None else file


def _own_journal(directory: Path) -> Path:
    return directory / "study.journal"


def storage_identity(storage: str | BaseStorage | None) -> str | None:
    """Return what tells one storage from another, without the password a URL may hold."""
    if isinstance(storage, str):
        return hashlib.sha256(storage.encode()).hexdigest()[:16]
    return None if storage is None else type(storage).__name__


def quiet_optuna() -> None:
    """Let Optuna log warnings only: for programs that show the progress themselves."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
