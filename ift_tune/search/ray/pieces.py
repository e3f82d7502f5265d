"""Pieces of work on a Ray cluster: each fills a folder, which comes home after every trial."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ift_tune.base.errors import IFTTuneError, Interrupted, WorkerError
from ift_tune.base.files import write_atomically
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.search.backends import RayTune
from ift_tune.search.ray.cluster import check_room, connected
from ift_tune.search.ray.session import allotted_device
from ift_tune.search.work import FolderWork, Relay
from ift_tune.trial.runner import Interrupt

_RETRIES = 2  # of a piece whose process or node dies
_LOCKS = (".lock", ".flock", ".asking")
_LOOK_SECONDS = 0.5  # how often the driver looks whether it shall stop

_Call: TypeAlias = tuple[str, tuple[Any, ...]]  # a hook's name and its arguments


def run_on_ray(
    work: FolderWork,
    backend: RayTune,
    callbacks: Sequence[Callback],
    interrupt: Interrupt,
    on_done: Callable[[int], None],
) -> None:
    """Do all unfinished pieces, as many at a time as the cluster has room for.

    No file system is shared: a piece begins from a copy of its folder here, and sends it back
    after each trial. One whose process or node dies goes on after the last trial that came home.

    Args:
        work: The pieces.
        backend: Which cluster, and what a piece needs.
        callbacks: Their hooks of the search are called here.
        interrupt: Looked at all the time; what no trial has brought home is lost.
        on_done: Called with the number of each piece that is finished.

    Raises:
        Interrupted: If the user asked to stop.
        UsageError: If no node can hold a piece, or a problem is not right.
        WorkerError: If a piece failed.
    """
    cpus, gpus = backend.cpus_per_trial, backend.gpus_per_trial
    with connected(backend.address):
        callback = CallbackList(callbacks)
        callback.on_resources(check_room(cpus, gpus))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        numbers = work.unfinished()
        folders = {number: work.folder(number) for number in numbers}
        actor = ray.remote(FolderServer).options(num_cpus=0, scheduling_strategy=here)
        home: Any = actor.remote(folders)
        remote = _piece.options(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
        running = {remote.remote(work, number, home): number for number in numbers}
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
                for name, arguments in ray.get(home.called.remote()):
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
    """Return a folder's files in an archive, the study last: it vouches for the others."""
    buffer = io.BytesIO()
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(_LOCKS)]
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(files, key=lambda p: (p.suffix == ".journal", p)):
            archive.add(path, arcname=str(path.relative_to(folder)))
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Write an archive's files into a folder, each at once or not at all."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content.read())


class FolderServer:
    """Lives on the driver's node, keeps the folders there, and notes what the pieces call."""

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self._folders = folders
        self._calls: list[_Call] = []

    def fetch(self, number: int) -> bytes:
        """Return a folder, packed."""
        return pack(self._folders[number])

    def store(self, number: int, data: bytes) -> None:
        """Unpack into a folder."""
        unpack(data, self._folders[number])

    def call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Note that a hook is to be called."""
        self._calls.append((name, arguments))

    def called(self) -> list[_Call]:
        """Return the hooks that are to be called, each once."""
        calls, self._calls = self._calls, []
        return calls


@ray.remote
def _piece(work: FolderWork, number: int, home: Any) -> None:
    """Do a piece in a folder of this node."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(ray.get(home.fetch.remote(number)), folder)
        work.one(
            number,
            folder,
            device=allotted_device(work.wanted_device),
            callbacks=[Relay(home.call.remote)],
            interrupt=Interrupt(),
            # It answers in the order of asking: a folder that is home means that all calls are.
            on_done=lambda _: ray.get(home.store.remote(number, pack(folder))),
        )


def _check(reference: ray.ObjectRef[None], name: str) -> None:
    """Raise what a piece has raised, our own mistakes as they are."""
    try:
        ray.get(reference)
    except IFTTuneError:  # Ray raises an error that is of the original's class too
        raise
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise WorkerError(f"{name} failed: {last}; what it has finished is saved") from error
