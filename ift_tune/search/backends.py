"""What runs the trials of a search: processes of this machine, or Ray Tune; and who gets what."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from ift_tune.base.arguments import require_text, shown, take_plain
from ift_tune.base.errors import UsageError, nearest, require_integer, require_number

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREADS_VARIABLE = "OMP_NUM_THREADS"

SCHEDULERS = ("none", "asha", "hyperband", "pbt")
PBT = "pbt"

_LOCAL_RAY = {
    # Ray's switch for systems on which it forms no clusters: all its sockets are then bound to the
    # loopback interface. Without it, they listen on every interface of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_QUIET_RAY = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in this process
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the first one is raised
    # A snapshot follows each checkpoint, so that a kill loses nothing; we know that.
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Processes:
    """Trials in this process, or side by side in several processes of this machine.

    Attributes:
        workers: How many processes; with one, trials run in the calling process, on all it has.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0; or a whole number, of processes that
            share a trial on a GPU each. Default: what there is, divided.
        pruner: What ends trials that do worse than others, or its name. Default: nothing.
        timeout: Seconds after which no further trial begins. Default: as long as it takes.
        catch: Exceptions after which a trial has failed and the others go on; one, or several.
        pack: How many trials of a process advance together, on its device.

    Raises:
        UsageError: If a number is out of range, or `catch` holds something else.
    """

    workers: int = 1
    gpus_per_trial: float | None = None
    pruner: str | BasePruner | None = None
    timeout: float | None = None
    catch: type[Exception] | Sequence[type[Exception]] = ()
    pack: int = 1

    def __post_init__(self) -> None:
        take_plain(self)
        require_integer("workers", self.workers, 1)
        require_integer("pack", self.pack, 1)
        if self.timeout is not None:
            require_number("timeout", self.timeout, above=0.0)
        for kind in self.caught:
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                raise UsageError(
                    "catch must be a class of exceptions such as RuntimeError, or a list of them, "
                    f"got {shown(kind)}"
                )
        if self.gpus_per_trial is not None:
            _require_gpus(self.gpus_per_trial)

    @property
    def caught(self) -> tuple[type[Exception], ...]:
        """The classes of `catch`, however many it was given."""
        return tuple(self.catch) if isinstance(self.catch, Iterable) else (self.catch,)

    def allocations(self, device: str, processes: int = 1) -> list[Allocation]:
        """Return what each worker may use; none if this process is the only one.

        Args:
            device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
            processes: How many share each trial.

        Raises:
            UsageError: If there are not enough GPUs.
        """
        if self.workers == 1 and self.gpus_per_trial is None:
            return []
        gpus = self.gpus_per_trial
        return allocate(self.workers, device, gpus, visible_gpus(), cores(), processes)


@dataclass(frozen=True)
class RayTune:
    """Trials on a Ray cluster, or on a Ray that is started on this machine.

    Attributes:
        address: Of a cluster; None starts Ray here, unless this process is connected already.
        cpus_per_trial: Cores, which are PyTorch's threads too.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0.
        scheduler: ``"none"``, ``"asha"``, ``"hyperband"`` or ``"pbt"``.

    Raises:
        UsageError: If a number is out of range, or there is no such scheduler.
    """

    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    scheduler: str = "none"

    def __post_init__(self) -> None:
        take_plain(self)
        cpus, gpus = self.cpus_per_trial, self.gpus_per_trial
        if not isinstance(gpus, int | float) or not 0.0 <= gpus <= 1.0:
            if isinstance(gpus, int | float) and gpus == gpus // 1:
                refuse_several_processes(gpus, "Ray")
            raise UsageError(f"a trial runs on at most one GPU, got {gpus} GPUs per trial")
        if self.address is not None:
            require_text("address", self.address)
        if not isinstance(cpus, int | float) or not 0.0 <= cpus < math.inf or cpus + gpus == 0:
            raise UsageError(f"a trial needs a CPU or a GPU, got {cpus} CPUs and {gpus} GPUs")
        if self.scheduler not in SCHEDULERS:
            raise UsageError(
                f"unknown scheduler {self.scheduler!r}{nearest(self.scheduler, SCHEDULERS)}"
            )

    def check(self, device: str) -> None:
        """Raise a `UsageError` if trials cannot have both the device and these resources."""
        if device == "cpu" and self.gpus_per_trial:
            raise UsageError("device cpu with GPUs per trial above 0: drop one of them")
        if device not in ("auto", "cpu") and not self.gpus_per_trial:
            raise UsageError(f"device {device} needs a GPU for each trial: --gpus-per-trial 1")


Backend: TypeAlias = Processes | RayTune


def prepare_ray(*, local: bool) -> None:
    """Set Ray's variables where the user has not; Ray reads them when it is imported.

    Args:
        local: Whether Ray is to be started here and not joined elsewhere: then it listens on the
            loopback interface alone.
    """
    for name, value in (_QUIET_RAY | (_LOCAL_RAY if local else {})).items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Allocation:
    """What one worker may use.

    Attributes:
        threads: Of PyTorch.
        gpu: The GPU it sees, as ``CUDA_VISIBLE_DEVICES`` names it, or several, for the processes of
            its trial; None for the CPU alone.
        memory: The fraction of that GPU's memory it may take.
    """

    threads: int
    gpu: str | None = None
    memory: float = 1.0

    def environment(self) -> dict[str, str]:
        """Return the variables of the worker's process."""
        variables = {THREADS_VARIABLE: str(self.threads)}
        return variables if self.gpu is None else variables | {GPU_VARIABLE: self.gpu}

    def apply(self) -> str:
        """Limit this process, before it uses CUDA or threads, and return the name of its device."""
        # The driver reads the GPUs' variable when CUDA is initialised: from here on in this
        # process, and not before in the one it was forked from. OpenMP has read its variable
        # already, when PyTorch was imported there: PyTorch is told itself.
        os.environ.update(self.environment())
        torch.set_num_threads(self.threads)
        if self.gpu is None:
            return "cpu"
        if self.memory < 1.0:
            torch.cuda.set_per_process_memory_fraction(self.memory, 0)
        return "cuda:0"


def allocate(
    workers: int,
    device: str,
    gpus_per_worker: float | None,
    gpus: Sequence[str],
    cores: int,
    processes: int = 1,
) -> list[Allocation]:
    """Return each worker's allocation.

    Args:
        workers: How many.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        gpus_per_worker: 1, or a part of 1 to share a GPU, or 0, or one for each of the processes of
            a trial; None: as many as there are.
        gpus: The visible GPUs; see `visible_gpus`.
        cores: The processor's cores.
        processes: How many share each trial.

    Raises:
        UsageError: If there are not enough GPUs, or a single GPU is named by its index.
    """
    given = os.environ.get(THREADS_VARIABLE, "")
    threads = int(given) if given.isdigit() else max(1, cores // (workers * processes))
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"workers share out the GPUs themselves, so --device {device} cannot be kept: use "
            f"auto, cpu or cuda, and {GPU_VARIABLE} to choose among the GPUs"
        )
    if gpus_per_worker is None:
        if device == "cpu" or (device == "auto" and not gpus):
            gpus_per_worker = 0.0
        elif processes > 1:
            gpus_per_worker = float(processes)
        else:
            gpus_per_worker = 1.0 / math.ceil(workers / max(1, len(gpus)))
    _require_gpus(gpus_per_worker)
    if gpus_per_worker not in (0.0, float(processes)) and max(gpus_per_worker, processes) > 1:
        raise UsageError(
            f"each process of a trial must have a GPU of its own: {processes} processes take "
            f"gpus_per_trial={processes}, or 0 for the CPU, got {gpus_per_worker:g}"
        )
    if gpus_per_worker == 0.0:
        return [Allocation(threads)] * workers
    if device == "cpu":
        raise UsageError("--device cpu with GPUs per trial above 0: drop one of them")
    if processes > 1:
        return _whole_gpus(workers, processes, gpus, threads)
    per_gpu = int(1.0 / gpus_per_worker + 1e-9)
    if workers > per_gpu * len(gpus):
        raise UsageError(
            f"{workers} workers at {gpus_per_worker:g} GPUs each do not fit: {len(gpus)} GPUs are "
            f"visible, which hold {per_gpu * len(gpus)}; use fewer workers, a smaller part of a "
            "GPU, or --device cpu"
        )
    return [Allocation(threads, gpus[w % len(gpus)], gpus_per_worker) for w in range(workers)]


def _whole_gpus(
    workers: int, processes: int, gpus: Sequence[str], threads: int
) -> list[Allocation]:
    if workers * processes > len(gpus):
        raise UsageError(
            f"{workers} workers at {processes} GPUs each do not fit: {len(gpus)} GPUs are visible; "
            "use fewer workers, fewer processes per trial, or --device cpu"
        )
    starts = range(0, workers * processes, processes)
    return [Allocation(threads, ",".join(gpus[i : i + processes])) for i in starts]


def processes_of(processes: object, gpus: float | None) -> int:
    """Return how many processes share a trial.

    Args:
        processes: What was asked for; None: one for each of the GPUs.
        gpus: Of a trial, see `Processes`.

    Raises:
        UsageError: If both were asked for, and differ.
    """
    if gpus is not None:
        _require_gpus(gpus)
    by_gpus = int(gpus) if gpus is not None and gpus > 1 else None
    if processes is None:
        return by_gpus or 1
    require_integer("processes_per_trial", processes, 1)
    found = int(processes)  # type: ignore[call-overload]
    if by_gpus is not None and found != by_gpus:
        raise UsageError(
            f"each process of a trial must have a GPU of its own: give one of the two, got "
            f"processes_per_trial={found} and gpus_per_trial={by_gpus}"
        )
    return int(found)


def describe(allocations: Sequence[Allocation]) -> str:
    """Return in a sentence what each worker is given."""
    workers = "1 worker" if len(allocations) == 1 else f"{len(allocations)} workers"
    threads = f"{workers} at a time, {allocations[0].threads} of PyTorch's threads each"
    if allocations[0].gpu is None:
        return f"{threads}, on the CPU"
    gpus = ", ".join(str(allocation.gpu) for allocation in allocations)
    if "," in allocations[0].gpu:
        return f"{threads}, each with several GPUs: {' and '.join(gpus.split(', '))}"
    return f"{threads}, each with {allocations[0].memory:g} of a GPU: {gpus}"


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    PyTorch counts them through the driver's management library, which leaves CUDA untouched.
    """
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPU_VARIABLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _require_gpus(gpus: float) -> None:
    if not isinstance(gpus, int | float) or not 0.0 <= gpus < math.inf:
        raise UsageError(f"gpus_per_trial must be a number of at least 0, got {shown(gpus)}")
    if gpus > 1.0 and gpus != int(gpus):
        raise UsageError(f"a trial takes a part of a GPU, or whole ones, got {gpus} GPUs per trial")


def refuse_several_processes(processes: float, what: str) -> None:
    """Raise a `UsageError` if trials shall be shared where each runs in one process.

    Args:
        processes: How many shall share a trial, or GPUs.
        what: What runs the trials, for the error.
    """
    if processes > 1:
        raise UsageError(
            f"{what} runs each trial in one process, on at most one GPU: share a trial by "
            "run_study(..., processes_per_trial=2), with --backend optuna "
            f"--processes-per-trial 2, or by run_single, got {processes:g}"
        )
