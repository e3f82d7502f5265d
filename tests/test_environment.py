"""What a run ran on is found without touching CUDA, and without passwords."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ift_tune.base.environment import (
    environment,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
)
from ift_tune.base.errors import UsageError


def forbidden(*_: Any) -> None:
    raise AssertionError("CUDA was touched")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("get_device_name", "get_device_properties", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, forbidden)


def test_the_driver_is_asked_for_the_gpus(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H200\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert environment()["gpus"] == ["NVIDIA H100", "NVIDIA H200"]


def test_without_the_drivers_program_they_are_only_counted(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    found = environment()
    assert found["gpus"] == ["unknown", "unknown"]
    assert found["git_commit"] is None


def test_versions_and_the_command_are_there_and_passwords_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "postgresql://me:secret@host/db"
    monkeypatch.setattr(sys, "argv", ["/somewhere/ift-tune", "search", "--storage", url])
    found = environment()
    assert torch.__version__.startswith(found["packages"]["torch"])  # it may name its CUDA too
    assert found["command"] == ["ift-tune", "search", "--storage", "postgresql://me:***@host/db"]


def test_the_environment_says_what_a_run_ran_on() -> None:
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"torch", "numpy", "pandas", "ift_tune"} <= set(found["packages"])
    assert all(found["packages"][name] for name in ("torch", "numpy", "pandas", "ift_tune"))
    assert {"python", "platform", "cpu", "gpus", "torch_threads", "git_commit"} <= set(found)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use auto, cpu, cuda"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="--device cpu"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    automatic = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto") == torch.device(automatic)


def test_the_cpu_keeps_no_peak_of_memory() -> None:
    reset_peak_memory(torch.device("cpu"))
    assert peak_memory_bytes(torch.device("cpu")) is None
