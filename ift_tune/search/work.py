"""What several processes share: numbered items of work, and the storage of a study."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileOpenLock, JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ift_tune.base.arguments import require_path, require_writable, shown
from ift_tune.base.errors import IFTTuneError, UsageError
from ift_tune.base.files import reading
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.locks import ProcessLock
from ift_tune.base.status import Outcome
from ift_tune.base.urls import reason, remembered, with_secrets, without_secrets
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import MetaConfig
from ift_tune.search.storage_faults import SignedJournal, mend_tail


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
JOURNAL_FILE = "study.journal"
"""Of a run directory."""


class OwnJournalLock(JournalFileOpenLock):
    """Locks a journal that this package alone writes to, by a lock that dies with its process.

    Optuna's own locks are files, made to work on any file system: one left by a killed process
    holds up everybody else for half a minute.
    """

    def __init__(self, journal: Path) -> None:
        """Take the journal's path."""
        super().__init__(str(journal))
        self._held = ProcessLock(f"{journal}.flock", poll_interval=0.01)

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
    remembered(storage)  # so that no later word of its driver repeats a secret
    try:
        if storage.startswith(JOURNAL):
            path = Path(storage.removeprefix(JOURNAL))
            return _open_journal(path, JournalFileSymlinkLock(str(path)))
        return optuna.storages.get_storage(storage)
    except IFTTuneError:
        raise
    except Exception as error:  # noqa: BLE001  (drivers raise classes of their own)
        # Not from it: a traceback would print the driver's words, which may repeat a password.
        raise UsageError(
            f"the storage {without_secrets(storage)} cannot be opened ({_why(error, storage)}): "
            "give sqlite:///FILE.db, journal:///DIR/FILE in a folder that exists, or a database's "
            "URL, in whose password @ is written %40 and / %2F"
        ) from None


def _why(error: BaseException, storage: str) -> str:
    """Return in a line why a storage cannot be opened: by its driver's name where that is missing.

    Optuna says only that some module is.
    """
    cause = error.__cause__ or error.__context__
    return reason(cause if isinstance(error, ImportError) and cause else error, storage)


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
        # A text that is no URL may hold a password all the same, and is not repeated.
        got = "another text" if isinstance(storage, str) else shown(storage)
        raise UsageError(f"storage must be an Optuna storage or {form}, got {got}")
    if (file := _file_of(storage)) is None:
        return
    if storage.startswith(JOURNAL) and "?" in file:
        raise UsageError(f"a journal's URL ends in its file, got {without_secrets(storage)}")
    path = require_path("the storage's file", file)
    if not file or path.is_dir():
        raise UsageError(
            f"the storage must name a file, as in {form}, got {without_secrets(storage)}"
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"the storage's folder {path.parent} is not there: make it, got "
            f"{without_secrets(storage)}"
        )
    require_writable("the storage's folder", path.parent)


def _file_of(storage: str) -> str | None:
    """Return the file that a storage's URL names, None if it names none."""
    if storage.startswith(JOURNAL):
        return storage.removeprefix(JOURNAL)
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):  # said when it is opened
        return None
    if url.get_backend_name() != "sqlite" or url.database == ":memory:":
        return None
    return None if url.database is None else url.database.removeprefix("file:")


def asking_lock(storage: str | BaseStorage | None, directory: Path) -> ProcessLock:
    """Return the lock under which trials are counted and asked for, so that none is too many.

    It lies beside the storage where that is a file, so that all processes on it find it, and in
    the run directory otherwise.
    """
    file = _file_of(storage) if isinstance(storage, str) else None
    path = directory / "study" if file is None else Path(file)
    return ProcessLock(f"{path}.asking", poll_interval=0.01)


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
    return directory / JOURNAL_FILE


def storage_identity(storage: str | BaseStorage | None) -> str | None:
    """Return what tells one storage from another, without the password a URL may hold."""
    if isinstance(storage, str):
        return _hash(without_secrets(storage))
    return None if storage is None else type(storage).__name__


def former_identity(storage: str | BaseStorage | None) -> str | None:
    """Return what told a storage from another in run directories of earlier versions.

    It is to be compared with only, and not to be written: a password can be guessed by it.
    """
    return _hash(storage) if isinstance(storage, str) else storage_identity(storage)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def set_aside(storage: str | BaseStorage | None) -> str | BaseStorage | None:
    """Return a storage as it may be written into a file: a URL without its secrets.

    This process keeps the whole URL for `taken_up`.
    """
    return remembered(storage) if isinstance(storage, str) else storage


def taken_up(storage: str | BaseStorage | None) -> str | BaseStorage | None:
    """Return the storage that was set aside, in this process, whole.

    Raises:
        UsageError: If it has secrets, and another process set it aside.
    """
    return with_secrets(storage) if isinstance(storage, str) else storage


def quiet_optuna() -> None:
    """Let Optuna log warnings only: for programs that show the progress themselves."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
