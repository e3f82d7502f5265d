"""The processes of one trial: this one leads, the others make the same calls on their shares.

A call goes out by pipe before the leader makes it itself: so nobody but the leader needs to know
of budgets, pruners, Ctrl-C, files and callbacks, and what it decides is decided for all. A process
that has died closes its connections, which ends the sums of the others at once; one that has failed
says why and, unless the leader has failed too, ends for that.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_start_method, set_start_method
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ift_tune.base.errors import (
    EnvironmentFaultError,
    IFTTuneError,
    UsageError,
    WorkerError,
    require_integer,
)
from ift_tune.base.spawning import (
    LATE_IMPORTS,
    end_with_parent,
    process_context,
    start,
)
from ift_tune.implicit.process_group import LostProcessError, ProcessGroup
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.data_parallel import DataParallelOptimizer
from ift_tune.problem.factory import build_problem
from ift_tune.problem.problem import BilevelProblem

THREADS = "OMP_NUM_THREADS"
_GRACE = 2.0  # seconds for the others to fail by themselves, where one has failed
_FAILED = 1  # exit status

_log = logging.getLogger(__name__)


def require_processes(processes: object, device: torch.device | None = None) -> None:
    """Raise a `UsageError` unless so many processes can share a trial.

    Args:
        processes: How many.
        device: Where the first of them computes, if that is known.
    """
    require_integer("processes_per_trial", processes, 1)
    if processes != 1 and not (dist.is_available() and dist.is_gloo_available()):
        raise UsageError(
            "several processes of a trial must have Gloo, which this PyTorch was built without: "
            f"install another build, or leave out processes_per_trial, got {processes}"
        )
    if device is None or device.type != "cuda":
        return
    visible, wanted = torch.cuda.device_count(), (device.index or 0) + int(str(processes))
    if processes != 1 and wanted > visible:
        raise UsageError(
            f"each process of a trial must have a GPU of its own, from {device} on: take fewer "
            f"processes_per_trial, or device='cpu', got {processes} processes and {visible} GPUs"
        )


class Team:
    """The processes of one trial, started together and ended together."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Start them.

        Args:
            size: How many there are, with this one.
            device: Where this one computes; the others take the GPUs after it, if it is one.

        Raises:
            EnvironmentFaultError: If one dies at that.
            UsageError: If there are not enough GPUs.
        """
        require_processes(size, device)
        self.size, self.device = size, device
        self._folder = tempfile.mkdtemp(prefix="ift-tune-")
        self._before = torch.get_num_threads()
        given = os.environ.get(THREADS, "")
        # The same number in each: with others, sums within a process would have other bits.
        threads = int(given) if given.isdigit() else max(1, self._before // size)
        self._members: list[_Member] = []
        self._replicas, self._busy = 0, False
        # However it ends: nobody else would, and multiprocessing waits for its processes at exit.
        self._end = weakref.finalize(self, _end, os.getpid(), self._members, self._folder)
        atexit.register(self._end)
        store = Path(self._folder, "store")
        for rank in range(1, size):
            self._members.append(_start(rank, size, store, threads))
        try:
            self._collect()
            torch.set_num_threads(threads)
            self._group = ProcessGroup(store, 0, size)
        except BaseException:
            self.close()
            raise

    def optimizer(
        self,
        problem: BilevelProblem,
        factory: Callable[..., Any],
        config: MetaConfig,
        seed: int,
        callbacks: Sequence[Callback],
    ) -> DataParallelOptimizer:
        """Return the leader's optimiser; the others have made theirs, and looked at their shares.

        Args:
            problem: What the factory has built here.
            factory: Builds it there; picklable.
            config: The trial's.
            seed: The trial's.
            callbacks: Of the leader.

        Raises:
            UsageError: If the processes do not build the same, or a loss cannot be shared.
        """
        number = self._replicas
        self._replicas += 1

        def announce(
            method: str, arguments: Mapping[str, Any], total_steps: int | None
        ) -> contextlib.AbstractContextManager[None]:
            return self._together(_Call(number, method, arguments, total_steps))

        build = _Build(number, factory, config, str(self.device), seed)
        with self._together(build):
            joint = DataParallelOptimizer(
                problem,
                config,
                group=self._group,
                announce=announce,
                seed=seed,
                callbacks=callbacks,
                problem_factory=factory,
            )
        joint.check_shares()
        # All have met by now, and a leader that is killed would leave it.
        shutil.rmtree(self._folder, ignore_errors=True)
        return joint

    def close(self) -> None:
        """End the other processes."""
        if self._end.alive:
            self._end()
            atexit.unregister(self._end)
            torch.set_num_threads(self._before)

    @contextlib.contextmanager
    def _together(self, message: _Build | _Call) -> Iterator[None]:
        """Let the others do what is done inside.

        Raises:
            Exception: What was raised first, here or in another process; the others have ended.
        """
        if not self._end.alive:
            if isinstance(message, _Call) and message.method == "close":
                yield  # which they have done by ending
                return
            raise WorkerError("the processes of this trial have ended: set it up again")
        if self._busy:
            raise UsageError(
                "a callback of a trial in several processes must leave its optimiser's steps and "
                "hypergradients to the trial: look at what it is given, or leave out "
                f"processes_per_trial, got a call of {getattr(message, 'method', 'setup')}"
            )
        self._busy = True
        try:
            pickled = pickle.dumps(message)
            for member in self._members:
                with contextlib.suppress(OSError):  # it has died, which the next sum finds out
                    member.pipe.send_bytes(pickled)
            yield
            self._collect()
        except LostProcessError as error:
            cause = self._first_word() or error
            self.close()
            raise cause from error
        except BaseException:
            self.close()
            raise
        finally:
            self._busy = False

    def _collect(self) -> None:
        """Wait until all others have done what they were asked for.

        Raises:
            Exception: What one of them has raised.
        """
        waiting = list(self._members)
        while waiting:
            ready = wait([member.pipe for member in waiting])
            for member in [m for m in waiting if m.pipe in ready]:
                waiting.remove(member)
                if (error := member.word()) is not None:
                    raise self._first_word(error) or error

    def _first_word(self, known: BaseException | None = None) -> BaseException | None:
        """Return what another process has failed by, or that it has died."""
        found = [] if known is None else [known]
        deadline = time.monotonic() + _GRACE
        for member in self._members:
            while member.pipe.poll(max(0.0, deadline - time.monotonic())):
                if (error := member.word()) is not None:
                    found.append(error)
                    break
        # One that has gone makes the others lose it; its own words come first.
        found.sort(key=lambda e: (isinstance(e, LostProcessError), isinstance(e, _Died)))
        return found[0] if found else None


class _Build(NamedTuple):
    """Build a problem and its optimiser."""

    number: int
    factory: Callable[..., Any]
    config: MetaConfig
    device: str
    seed: int


class _Call(NamedTuple):
    """Call a method of an optimiser."""

    number: int
    method: str
    arguments: Mapping[str, Any]
    total_steps: int | None


class _Died(EnvironmentFaultError):
    """A process of a trial is gone without a word."""


class _Member:
    """Another process, as the leader sees it."""

    def __init__(self, rank: int, size: int, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self._name = f"process {rank + 1} of the {size} of this trial"
        self._last: BaseException | None = None

    def word(self) -> BaseException | None:
        """Return what it has failed by, None if it has done what it was asked for."""
        if self._last is not None:
            return self._last
        try:
            found = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join(_GRACE)
            found = _Died(
                f"{self._name} has died (exit status -9 is often the system out of memory): "
                "everything up to the last checkpoint is kept, go on with --resume (resume=True), "
                f"got exit status {self.process.exitcode}"
            )
        self._last = found
        return self._last


def _start(rank: int, size: int, store: Path, threads: int) -> _Member:
    context = process_context([__name__, *LATE_IMPORTS])
    ours, theirs = context.Pipe()
    process = context.Process(
        target=follow,
        args=(dict(os.environ), rank, size, store, threads, get_start_method(), theirs),
        name=f"process-{rank}",
    )
    start(process, {THREADS: str(threads)})
    theirs.close()  # only that process has it open now: when it dies, we read an end of file
    _log.info("process %d of %d is %s", rank, size, process.pid)
    return _Member(rank, size, process, ours)


def _end(leader: int, members: list[_Member], folder: str) -> None:
    if os.getpid() != leader:  # a fork of it, as loaders make
        return
    for member in members:
        member.pipe.close()
        member.process.kill()
    for member in members:
        member.process.join()
    shutil.rmtree(folder, ignore_errors=True)


def follow(
    environment: Mapping[str, str],
    rank: int,
    size: int,
    store: Path,
    threads: int,
    starts: str,
    pipe: Connection,
) -> None:
    """Be one of the others: the main function of its process.

    Args:
        environment: The leader's: that of a forkserver is of the time when it was started.
        rank: Of this process.
        size: How many there are.
        store: The file by which they meet.
        threads: Of PyTorch.
        starts: How loaders start their worker processes: as the leader's do.
        pipe: Where calls come from and words go to.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the leader too, which decides
    end_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    set_start_method(starts, force=True)
    logging.disable(logging.ERROR)  # the leader says the same
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, OSError):  # the leader is gone, and nobody would resume
        pipe.send_bytes(pickle.dumps(None))
        group = ProcessGroup(store, rank, size)
        replicas: dict[int, DataParallelOptimizer] = {}
        while True:
            message = pipe.recv_bytes()
            try:
                _do(pickle.loads(message), group, replicas)
            except BaseException as error:  # noqa: BLE001  (told to the leader, whatever it is)
                pipe.send_bytes(_as_words(error, rank, size))
                if not pipe.poll(_GRACE):
                    os._exit(_FAILED)  # the others, who wait for a sum, wait no longer
            else:
                pipe.send_bytes(pickle.dumps(None))


def _do(message: _Build | _Call, group: ProcessGroup, replicas: dict[int, Any]) -> None:
    if isinstance(message, _Call):
        joint = replicas[message.number]
        joint.total_steps = message.total_steps
        getattr(joint, message.method)(**message.arguments)
        return
    device = torch.device(message.device)
    if device.type == "cuda":
        device = torch.device("cuda", (device.index or 0) + group.rank)
    problem = build_problem(message.factory, message.config, device, message.seed)
    replicas[message.number] = DataParallelOptimizer(
        problem,
        message.config,
        group=group,
        seed=message.seed,
        problem_factory=message.factory,
    )


def _as_words(error: BaseException, rank: int, size: int) -> bytes:
    """Return an exception for the leader to raise, with where it comes from."""
    where = "".join(traceback.format_exception(error))
    error.__cause__, error.__context__ = None, None
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"in process {rank + 1} of the {size} of a trial:\n{where}")
    with contextlib.suppress(Exception):
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        if isinstance(error, Exception):
            return pickled
    kind = WorkerError if not isinstance(error, IFTTuneError) else IFTTuneError
    return pickle.dumps(kind(f"a process of the trial failed: {type(error).__name__}: {error}"))
