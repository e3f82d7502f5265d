"""Starting Ray or joining a cluster, and work on it whose results are folders."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ift_tune.base.errors import IFTTuneError, Interrupted, UsageError, WorkerError
from ift_tune.base.files import write_atomically
from ift_tune.base.interrupt import Interrupt
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.search.backends import RayTune
from ift_tune.search.ray.session import allotted_device
from ift_tune.search.ray.watch import watching
from ift_tune.search.work import FolderWork, Relay

# The signal at which Ray ends ``Tuner.fit`` after a snapshot. Windows has none: there fit is left
# at once, and what goes on is its latest snapshot, of the last checkpoint.
_LISTENED: int = getattr(signal, "SIGUSR1", 0)
_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # TensorBoard's, whose threads print tracebacks where a search is left.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
_RETRIES = 2  # of an item whose process or node dies
_LOCKS = (".lock", ".flock", ".asking")
_LOOK_SECONDS = 0.5  # how often the driver looks whether it shall stop
_OBJECT_STORE = 200 * 2**20  # bytes; what a trial sends is a few kilobytes at a time

_Call: TypeAlias = tuple[str, tuple[Any, ...]]  # a hook's name and its arguments


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Use the Ray that this process is connected to already; else join `address`, or start one.

    Raises:
        UsageError: If there is no cluster at the address.
        EnvironmentFaultError: If Ray's processes on this machine die meanwhile.
    """
    if ray.is_initialized():
        with watching():
            yield
        return
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster can be joined at {address!r} ({str(error).splitlines()[0]}): start "
            "one with `ray start --head`, or leave --address out to start Ray here"
        ) from error
    with watching():
        try:
            yield
        finally:
            ray.shutdown()


def concurrency(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> str:
    """Return in a sentence how many trials run at a time.

    Args:
        nodes: What each node offers, ``{"CPU": 8.0, "GPU": 2.0}``.
        cpus: Of a trial.
        gpus: Of a trial, possibly a part of one.

    Raises:
        UsageError: If no node can hold a trial, which Ray would wait for without end.
    """
    RayTune(cpus_per_trial=cpus, gpus_per_trial=gpus)  # refuses what no node could have
    offered = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    slots = sum(_slots(node, cpus, gpus) for node in offered)
    nodes_text = _count(len(offered), "node")
    total = f"{sum(c for c, _ in offered):g} CPUs and {sum(g for _, g in offered):g} GPUs"
    wanted = f"{cpus:g} CPUs and {gpus:g} GPUs"
    if not slots:
        each = "; ".join(f"{c:g} CPUs and {g:g} GPUs" for c, g in offered)
        raise UsageError(
            f"a trial needs {wanted}, and no node has them ({each}): lower --cpus-per-trial or "
            "--gpus-per-trial, or start Ray where there are more"
        )
    return f"{nodes_text} with {total}; a trial takes {wanted}: {slots} at a time"


def check_room(cpus: float, gpus: float) -> str:
    """Return `concurrency` for the cluster this process is connected to."""
    return concurrency([n["Resources"] for n in ray.nodes() if n["Alive"]], cpus, gpus)


def _slots(node: tuple[float, float], cpus: float, gpus: float) -> int:
    """Return how many trials fit on a node. A share of a GPU does not reach over two of them."""
    counts = []
    if cpus:
        counts.append(int(node[0] / cpus + 1e-9))
    if gpus:
        counts.append(int(node[1]) * int(1 / gpus + 1e-9))
    return min(counts)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _end_fit() -> None:
    if not _LISTENED:
        raise KeyboardInterrupt
    signal.raise_signal(_LISTENED)


@contextlib.contextmanager
def stopping_ray() -> Iterator[Interrupt]:
    """Let Ctrl-C and SIGTERM end ``Tuner.fit`` after a snapshot, and note that they came.

    Ray's own handlers swallow the one, and end the process at the other.
    """
    interrupt = Interrupt(then=_end_fit)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    asked = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    # While Ray does not listen yet.
    before = signal.signal(_LISTENED, signal.SIG_IGN) if _LISTENED else None
    try:
        with interrupt.listening():
            yield interrupt
    finally:
        if _LISTENED:
            signal.signal(_LISTENED, before)
        for name, value in asked.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_on_ray(
    work: FolderWork,
    backend: RayTune,
    callbacks: Sequence[Callback],
    interrupt: Interrupt,
    on_done: Callable[[int], None],
) -> None:
    """Do all unfinished items, as many at a time as the cluster has room for.

    The nodes need no file system in common: an item begins from a copy of its folder on this
    machine, and sends the folder back after each trial. An item whose process or node dies goes on
    after the last trial that was sent back.

    Args:
        work: The items.
        backend: Which cluster, and what an item needs.
        callbacks: Their hooks of the search are called here.
        interrupt: Looked at all the time; trials that have not been sent back are lost.
        on_done: Called with the number of each item that is finished.

    Raises:
        Interrupted: If the user asked to stop.
        UsageError: If no node has what an item needs, or a problem is not right.
        WorkerError: If an item failed.
    """
    cpus, gpus = backend.cpus_per_trial, backend.gpus_per_trial
    with connected(backend.address):
        callback = CallbackList(callbacks)
        callback.on_resources(check_room(cpus, gpus))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        numbers = work.unfinished()
        folders = {number: work.folder(number) for number in numbers}
        actor = ray.remote(FolderServer).options(num_cpus=0, scheduling_strategy=here)
        server: Any = actor.remote(folders)
        remote = _do_item.options(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
        running = {remote.remote(work, number, server): number for number in numbers}
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
                for name, arguments in ray.get(server.called.remote()):
                    getattr(callback, name)(*arguments)
                if interrupt.requested:
                    raise Interrupted("interrupted; finished trials are saved")
                for reference in done:
                    number = running.pop(reference)
                    _check(reference, work.name_of(number))
                    work.finish(number)
                    on_done(number)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def pack(folder: Path) -> bytes:
    """Return a folder's files in an archive.

    The study comes last: should unpacking end in the middle, it knows no trial without its files.
    """
    buffer = io.BytesIO()
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(_LOCKS)]
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(files, key=lambda p: (p.suffix == ".journal", p)):
            archive.add(path, arcname=str(path.relative_to(folder)))
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Write an archive's files into a folder, each atomically."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content.read())


class FolderServer:
    """An actor on the driver's node, with access to the folders there; collects calls of hooks."""

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self._folders = folders
        self._calls: list[_Call] = []

    def fetch(self, number: int) -> bytes:
        """Return a folder's archive."""
        return pack(self._folders[number])

    def store(self, number: int, data: bytes) -> None:
        """Unpack an archive into a folder."""
        unpack(data, self._folders[number])

    def call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Keep the call of a hook for the driver."""
        self._calls.append((name, arguments))

    def called(self) -> list[_Call]:
        """Return the calls since the last time."""
        calls, self._calls = self._calls, []
        return calls


@ray.remote
def _do_item(work: FolderWork, number: int, server: Any) -> None:
    """Do an item in a temporary folder of this node."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(ray.get(server.fetch.remote(number)), folder)
        work.do_item(
            number,
            folder,
            device=allotted_device(work.wanted_device),
            callbacks=[Relay(server.call.remote)],
            interrupt=Interrupt(),
            # An actor answers in the order of asking: when the folder is there, all calls are.
            on_done=lambda _: ray.get(server.store.remote(number, pack(folder))),
        )


def _check(reference: ray.ObjectRef[None], name: str) -> None:
    """Raise what an item has raised, errors of this package as they are."""
    try:
        ray.get(reference)
    except IFTTuneError:  # Ray raises an error that is of the original's class too
        raise
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise WorkerError(f"{name} failed: {last}; what it has finished is saved") from error
