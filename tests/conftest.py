"""Fixtures of tests in several folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import call as call
from hypothesis import settings

from ift_tune.tasks.datasets import DATA_VARIABLE

# How long an example takes tells of the machine. Newer versions of Hypothesis do so in CI by
# themselves.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder that holds MNIST/raw; skip where there is none."""
    root = Path(os.environ.get(DATA_VARIABLE, ""))
    if not os.environ.get(DATA_VARIABLE) or not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"set {DATA_VARIABLE} to a folder with MNIST/raw to run the tests on MNIST")
    return root.absolute()
