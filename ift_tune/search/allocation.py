"""Dividing one machine among several workers: a GPU or a part of one each, or some threads."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ift_tune.base.errors import UsageError

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Allocation:
    """What one worker may use.

    Attributes:
        threads: Of PyTorch.
        gpu: The one GPU it sees, as ``CUDA_VISIBLE_DEVICES`` names it; None for the CPU alone.
        memory: The fraction of that GPU's memory it may take.
    """

    threads: int
    gpu: str | None = None
    memory: float = 1.0

    def environment(self) -> dict[str, str]:
        """Return the variables of the worker's process, set before it starts."""
        variables = {THREADS_VARIABLE: str(self.threads)}
        return variables if self.gpu is None else variables | {GPU_VARIABLE: self.gpu}

    def apply(self) -> str:
        """Limit this process, and return the name of its device."""
        torch.set_num_threads(self.threads)
        if self.gpu is None:
            return "cpu"
        if self.memory < 1.0:
            torch.cuda.set_per_process_memory_fraction(self.memory, 0)
        return "cuda:0"


def allocate(
    workers: int, device: str, gpus_per_worker: float | None, gpus: Sequence[str], cores: int
) -> list[Allocation]:
    """Return each worker's allocation.

    Args:
        workers: How many.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        gpus_per_worker: 1, or a part of 1 to share a GPU, or 0; None: as many as there are.
        gpus: The visible GPUs; see `visible_gpus`.
        cores: The processor's cores.

    Raises:
        UsageError: If there are not enough GPUs, or a single GPU is named by its index.
    """
    given = os.environ.get(THREADS_VARIABLE, "")
    threads = int(given) if given.isdigit() else max(1, cores // workers)
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"workers share out the GPUs themselves, so --device {device} cannot be kept: use "
            f"auto, cpu or cuda, and {GPU_VARIABLE} to choose among the GPUs"
        )
    if gpus_per_worker is None:
        if device == "cpu" or (device == "auto" and not gpus):
            gpus_per_worker = 0.0
        else:
            gpus_per_worker = 1.0 / math.ceil(workers / max(1, len(gpus)))
    if not 0.0 <= gpus_per_worker <= 1.0:
        raise UsageError(f"a trial runs on at most one GPU, got {gpus_per_worker:g} GPUs per trial")
    if gpus_per_worker == 0.0:
        return [Allocation(threads)] * workers
    if device == "cpu":
        raise UsageError("--device cpu with GPUs per trial above 0: drop one of them")
    per_gpu = int(1.0 / gpus_per_worker + 1e-9)
    if workers > per_gpu * len(gpus):
        raise UsageError(
            f"{workers} workers at {gpus_per_worker:g} GPUs each do not fit: {len(gpus)} GPUs are "
            f"visible, which hold {per_gpu * len(gpus)}; use fewer workers, a smaller part of a "
            "GPU, or --device cpu"
        )
    return [Allocation(threads, gpus[w % len(gpus)], gpus_per_worker) for w in range(workers)]


def describe(allocations: Sequence[Allocation]) -> str:
    """Return in a sentence what each worker is given."""
    workers = "1 worker" if len(allocations) == 1 else f"{len(allocations)} workers"
    threads = f"{workers} at a time, {allocations[0].threads} of PyTorch's threads each"
    if allocations[0].gpu is None:
        return f"{threads}, on the CPU"
    gpus = ", ".join(str(allocation.gpu) for allocation in allocations)
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
