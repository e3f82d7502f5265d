"""Choosing a device by name, and what can be measured on it."""

from __future__ import annotations

from pathlib import Path

import torch

from ift_tune.errors import UsageError


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`; ``"auto"`` is the first GPU, or the CPU without one.

    Raises:
        UsageError: If the name is not a device, or a GPU is asked for and none is visible.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        visible = torch.cuda.device_count()
        index = device.index or 0
        if index >= visible:
            raise UsageError(
                f"device {name} was asked for, but {visible} GPUs are visible to this process; "
                "use --device cpu, or set CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", index)
    return device


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
        torch.cuda.reset_peak_memory_stats(device)
