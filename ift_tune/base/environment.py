"""What a run runs on: versions and hardware, written beside its tables; devices by name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError
from ift_tune.base.urls import without_secrets

_PACKAGES = ("ift_tune", "torch", "torchvision", "numpy", "pandas", "scikit-learn", "optuna", "ray")


def environment() -> dict[str, Any]:
    """Return versions, processors, threads, the git commit of the code, and the command."""
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "git_commit": _commit(),
        "command": [Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout this package is imported from, None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", "__init__.py")  # not some other checkout's venv
        return _git(here, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _gpus() -> list[str]:
    """Return the names of the machine's GPUs, asked of the driver: CUDA itself stays untouched.

    A process that hands trials on to others would otherwise hold memory on a GPU of theirs.
    """
    if not torch.cuda.device_count():
        return []
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return _output(query).splitlines()
    except (OSError, subprocess.SubprocessError):
        return ["unknown"] * torch.cuda.device_count()


def _git(folder: Path, *arguments: str) -> str:
    return _output(["git", "-C", str(folder), *arguments])


def _output(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return found.stdout.strip()


def _processor() -> str:
    """Return the processor's model where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`; ``"auto"`` is the first GPU, or the CPU without one.

    Raises:
        UsageError: If the name is not a device, or a GPU is asked for and none is visible.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TypeError(f"{device.type} has not what this package needs")
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"unknown device: use auto, cpu, cuda or cuda:N, got {shown(name)}"
        ) from error
    if device.type == "cuda":
        visible = torch.cuda.device_count()
        index = device.index or 0
        if index >= visible:
            raise UsageError(
                f"device {name} was asked for, but {visible} GPUs are visible to this process; "
                "use --device cpu, or set CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", index)
    return torch.device("cpu")


def gpu_is_plugged_in() -> bool:
    """Return whether the system has a GPU's driver loaded, whether or not PyTorch can use it."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/kfd"))


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory tensors took on a GPU since `reset_peak_memory`; None on the CPU.

    The CPU allocator keeps no such figure, and the process's peak belongs to all it ever did.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring afresh."""
    if device.type == "cuda":
        # Before its first use the device is unknown to the allocator.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
