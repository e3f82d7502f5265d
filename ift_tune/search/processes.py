"""Several processes on one study, each on its own share of the machine; the dead are replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from ift_tune.base.errors import IFTTuneError, UsageError, WorkerError
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.search.allocation import Allocation, describe
from ift_tune.search.storage import quiet_optuna
from ift_tune.search.work import Relay, Work, Worker
from ift_tune.trial.runner import Interrupt, Interrupted

DEATHS = 3  # of processes at the same trial (or at none), after which it is given up


_LOOK_SECONDS = 0.2  # how often the parent looks whether it shall stop


_PARENT_DIED = 3


def check_importable(*arguments: object) -> None:
    """Raise a `UsageError` if arguments of a study cannot travel to another process."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    from_nowhere = script is None or not Path(script).exists()
    try:
        pickled = pickle.dumps(arguments)
        if from_nowhere and (script is not None or b"__main__" in pickled):
            raise TypeError("this program is no file that they could import")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"workers are processes of their own, to which this study cannot travel ({error}): "
            "problem_factory and sampler must be functions at the top of an importable module, and "
            "callbacks with hooks of the optimisation must be picklable"
        ) from error


def run_workers(
    work: Work,
    session: Worker,
    allocations: list[Allocation],
    callbacks: Sequence[Callback],
    interrupt: Interrupt,
    on_done: Callable[[int], None],
) -> None:
    """Do the work in as many processes as there are allocations, to its end.

    Args:
        work: What to do; it has the callbacks' hooks of the optimisation.
        session: Names the workers.
        allocations: What each worker may use.
        callbacks: Their hooks of the search are called here.
        interrupt: Looked at all the time.
        on_done: Called with the number of each piece that is finished.

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
    process: SpawnProcess
    events: Connection
    ready: bool = False
    started: bool = False
    finished: bool = False

    def start(self) -> None:
        """Let it claim its first trial."""
        if not self.started:
            self.started = True
            with contextlib.suppress(OSError):  # it has died: the next look buries it
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
        context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA and threads
        worker = self.session._replace(number=self._started)
        self._started += 1
        events, theirs = context.Pipe()
        process = context.Process(
            target=be_worker,
            args=(self.work, worker, allocation, theirs),
            name=f"worker-{worker.number}",
        )
        with _variables(allocation.environment()), _without_interrupts():
            process.start()
        theirs.close()  # the child's copy alone keeps it open: its death is an end of file
        self.members.append(_WorkerProcess(worker, allocation, process, events))

    def stop(self) -> None:
        """Ask all workers to save and stop."""
        if not self._stopping:
            self._stopping = True
            for member in self.members:
                member.process.terminate()
                member.start()  # so that it looks up

    def poll(self) -> None:
        """Hear what the workers say, and replace those that have died."""
        ends = [end for m in self.members for end in (m.events, m.process.sentinel)]
        ready = wait(ends, timeout=_LOOK_SECONDS)
        for member in list(self.members):
            if member.events not in ready and member.process.sentinel in ready:
                self._on_exit(member)
            elif member.events in ready:
                try:
                    name, arguments = member.events.recv()
                except (EOFError, ConnectionError):
                    self._on_exit(member)
                else:
                    self._on_message(member, name, arguments)

    def _on_message(self, member: _WorkerProcess, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "told":
            self.on_done(*arguments)
        elif name == "error":
            self.error = self.error or arguments[0]
            self.stop()
        elif name == "finished":
            member.finished = True
        elif name == "ready":
            # All begin together: else the first to have imported everything would run alone.
            member.ready = True
            if all(other.ready for other in self.members):
                for other in self.members:
                    other.start()
        else:
            getattr(self.callback, name)(*arguments)

    def _on_exit(self, member: _WorkerProcess) -> None:
        """Let a worker go; if it left in the middle of its work, put another in its place."""
        member.process.join()
        member.events.close()
        self.members.remove(member)
        if member.finished or self._stopping:
            return
        self.session = self.session._replace(dead=self.session.dead | {member.worker.number})
        number = self.work.left_by(member.worker)
        self._deaths[number] += 1
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


def be_worker(work: Work, worker: Worker, allocation: Allocation, parent_end: Connection) -> None:
    """Be a worker: the main function of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    _end_with_parent()
    quiet_optuna()

    def tell(name: str, arguments: tuple[Any, ...] = ()) -> None:
        try:
            parent_end.send((name, arguments))
        except OSError:  # nobody listens, and nobody would resume what is done from here on
            os._exit(_PARENT_DIED)

    interrupt = Interrupt(patient=True)  # the parent asks, and whoever asked it may ask us too
    try:
        with interrupt.listening([signal.SIGTERM]):
            tell("ready")
            parent_end.recv()
            here = work.on(allocation.apply())
            here.do(worker, [Relay(tell)], interrupt, lambda number: tell("told", (number,)))
    except Interrupted:
        pass
    except UsageError as error:
        tell("error", (error,))
    except Exception as error:
        text = f"a worker failed with the traceback above: {type(error).__name__}: {error}"
        tell("error", (WorkerError(text),))
        raise
    tell("finished")


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that died: nobody would resume it."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(_PARENT_DIED)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, from their first instruction on."""
    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
