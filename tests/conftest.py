"""Fixtures of tests in several folders."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import call as call
from hypothesis import settings

from ift_tune.search.backends import THREADS_VARIABLE
from ift_tune.tasks.datasets import DATA_VARIABLE
from ift_tune.tasks.vision import torchvision_part

# How long an example takes tells of the machine. Newer versions of Hypothesis do so in CI by
# themselves.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Give each of the processes that test side by side one thread, and those they start."""
    # Images of containers forbid compiled files, and each of a hundred processes that import the
    # package would compile it anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ.setdefault(THREADS_VARIABLE, "1")
    torch.set_num_threads(int(os.environ[THREADS_VARIABLE]))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder that holds MNIST/raw; skip where there is none."""
    root = Path(os.environ.get(DATA_VARIABLE, ""))
    if not os.environ.get(DATA_VARIABLE) or not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"set {DATA_VARIABLE} to a folder with MNIST/raw to run the tests on MNIST")
    return root.absolute()


@pytest.fixture(scope="session")
def peft() -> ModuleType:
    """Return peft; skip where it or transformers is not installed."""
    for name in ("transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        torchvision_part("transforms")  # or a CUDA build of it beside a CPU build of PyTorch fails
    return importlib.import_module("peft")
