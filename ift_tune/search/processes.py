"""Several processes on one study, each on its own share of the machine; the dead are replaced.

On Linux, workers are forked from a forkserver: a process that has imported PyTorch and this
package, has started no threads (but an allocator's, which knows of forks) and has not touched CUDA.
A fork of the calling process would inherit its threads' locks and its CUDA context, neither of
which survives a fork; a process started from nothing (spawn) takes seconds to import all that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ift_tune.base.errors import (
    EnvironmentFaultError,
    IFTTuneError,
    Interrupted,
    MissingDependencyError,
    UsageError,
    WorkerError,
)
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.once import saying_once
from ift_tune.base.spawning import (
    LATE_IMPORTS,
    PARENT_DIED,
    end_with_parent,
    process_context,
    receive_deferred_signals,
    start,
)
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.search.backends import Allocation, describe
from ift_tune.search.work import Relay, Work, Worker, quiet_optuna

DEATHS = 3  # of processes at the same trial (or at none), after which it is given up

_LOOK_SECONDS = 0.2  # how often the parent looks whether it shall stop
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # which ends a process at once on Windows

_log = logging.getLogger(__name__)


def run_workers(
    work: Work,
    session: Worker,
    allocations: list[Allocation],
    callbacks: Sequence[Callback],
    interrupt: Interrupt,
    on_done: Callable[[int], None],
) -> None:
    """Do the work to its end, in as many processes as there are allocations.

    Args:
        work: What to do; it has the callbacks' hooks of the optimisation.
        session: Names the workers.
        allocations: What each worker may use.
        callbacks: Their hooks of the search are called here.
        interrupt: Looked at all the time.
        on_done: Called with the number of each item that is finished.

    Raises:
        Interrupted: If the user asked to stop; all trials are saved.
        UsageError: If a worker found a mistake of the user's.
        WorkerError: If a problem raised, or processes died at one trial again and again.
    """
    callback = CallbackList(callbacks)
    callback.on_resources(describe(allocations))
    pool = WorkerPool(work, session, callback, on_done)
    try:
        for allocation in allocations:
            pool.start(allocation)
        while pool.members:
            if interrupt.requested:
                pool.stop()
            pool.poll()
    finally:
        for member in pool.members:
            member.process.kill()
            member.process.join()
    if pool.error is not None:
        raise pool.error
    if interrupt.requested:
        raise Interrupted("all workers were interrupted and have saved their trials")


@dataclass
class _WorkerProcess:
    worker: Worker
    allocation: Allocation
    process: BaseProcess
    events: Connection
    ready: bool = False
    started: bool = False
    finished: bool = False

    def start(self) -> None:
        """Tell it to begin."""
        if not self.started:
            self.started = True
            with contextlib.suppress(OSError):  # it has died, which the next poll finds out
                self.events.send("start")


@dataclass
class WorkerPool:
    """The workers of a session, as their parent sees them."""

    work: Work
    session: Worker
    callback: Callback
    on_done: Callable[[int], None]
    members: list[_WorkerProcess] = field(default_factory=list)
    error: IFTTuneError | None = None
    _started: int = 0
    _deaths: Counter[int | None] = field(default_factory=Counter)
    _stopping: bool = False

    def start(self, allocation: Allocation) -> None:
        """Start a worker."""
        context = process_context([__name__, type(self.work).__module__, *LATE_IMPORTS])
        worker = self.session._replace(number=self._started)
        self._started += 1
        events, theirs = context.Pipe()
        process = context.Process(
            target=be_worker,
            args=(dict(os.environ), allocation, pickle.dumps(self.work), worker, theirs),
            name=f"worker-{worker.number}",
        )
        start(process, allocation.environment())
        _log.info("worker %d is process %s", worker.number, process.pid)
        theirs.close()  # only the worker has it open now: when it dies, we read an end of file
        self.members.append(_WorkerProcess(worker, allocation, process, events))

    def stop(self) -> None:
        """Ask all workers to save and stop."""
        if not self._stopping:
            self._stopping = True
            for member in self.members:
                member.process.terminate()
                member.start()  # one that waits for its start looks for the signal only then

    def poll(self) -> None:
        """Take the workers' messages, and replace those that have died."""
        ends = [end for m in self.members for end in (m.events, m.process.sentinel)]
        ready = wait(ends, timeout=_LOOK_SECONDS)
        for member in list(self.members):
            if member.events not in ready and member.process.sentinel in ready:
                # Its end of the pipe is open: by a process that it has started, or because it is
                # alive and the forkserver, which would know, is not. It must not go on beside the
                # worker that takes its place.
                with contextlib.suppress(ProcessLookupError):
                    if member.process.pid is not None:
                        os.kill(member.process.pid, _KILL)
                self._on_exit(member)
            elif member.events in ready:
                try:
                    name, arguments = member.events.recv()
                except (EOFError, ConnectionError):
                    self._on_exit(member)
                else:
                    self._on_message(member, name, arguments)

    def _on_message(self, member: _WorkerProcess, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "done":
            self.on_done(*arguments)
            with contextlib.suppress(OSError):  # it has died, which the next poll finds out
                member.events.send("go on")
        elif name == "error":
            self.error = self.error or arguments[0]
            self.stop()
        elif name == "finished":
            member.finished = True
        elif name == "ready":
            # All begin together: else the one that is ready first would take several trials.
            member.ready = True
            if all(other.ready for other in self.members):
                for other in self.members:
                    other.start()
        else:
            getattr(self.callback, name)(*arguments)

    def _on_exit(self, member: _WorkerProcess) -> None:
        """Forget a worker that has ended; if its work was not done, start another."""
        member.process.join()
        member.events.close()
        self.members.remove(member)
        if member.finished or self._stopping:
            return
        self.session = self.session._replace(dead=self.session.dead | {member.worker.number})
        number = self.work.left_by(member.worker)
        self._deaths[number] += 1
        _log.warning("worker %d died: %s", member.worker.number, member.process.exitcode)
        if self._deaths[number] < DEATHS:
            self.start(member.allocation)
            return
        where = "before they had a trial" if number is None else f"at {self.work.name_of(number)}"
        self.error = WorkerError(
            f"{DEATHS} processes died {where}, the last with exit status "
            f"{member.process.exitcode} (-9 is often the system out of memory); the other trials "
            "are saved: --resume goes on with them"
        )
        if number is not None:
            self.work.give_up(number)
        self.stop()


@saying_once()
def be_worker(
    environment: Mapping[str, str],
    allocation: Allocation,
    pickled: bytes,
    worker: Worker,
    parent_end: Connection,
) -> None:
    """Be a worker: the main function of its process.

    Args:
        environment: The parent's: that of a forkserver is of the time when it was started.
        allocation: What to use.
        pickled: The work. Its modules are imported here, after the environment has been set.
        worker: Who this is.
        parent_end: Where messages go and where the start comes from.
    """
    interrupt = Interrupt(patient=True)  # the parent asks, and whoever asked it may ask us too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    end_with_parent()
    quiet_optuna()

    def tell(name: str, arguments: tuple[Any, ...] = ()) -> None:
        try:
            parent_end.send((name, arguments))
        except OSError:  # nobody listens, and nobody would resume what is done from here on
            os._exit(PARENT_DIED)

    def done(number: int) -> None:
        tell("done", (number,))
        try:
            parent_end.recv()  # callbacks that may stop the study come before the next item
        except (EOFError, OSError):
            os._exit(PARENT_DIED)

    try:
        with interrupt.listening([signal.SIGTERM]):
            receive_deferred_signals()
            os.environ.clear()
            os.environ.update(environment)
            device = allocation.apply()
            work: Work = pickle.loads(pickled)
            tell("ready")
            parent_end.recv()
            work.on(device).do(worker, [Relay(tell)], interrupt, done)
    except EnvironmentFaultError as error:
        tell("error", (error,))
    except Interrupted:
        pass
    except (UsageError, MissingDependencyError) as error:
        tell("error", (error,))
    except Exception as error:
        text = f"a worker failed with the traceback above: {type(error).__name__}: {error}"
        tell("error", (WorkerError(text),))
        raise
    tell("finished")
