"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ift_tune.tasks.data import DATA_VARIABLE


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder that holds MNIST/raw; skip where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get(DATA_VARIABLE) or beside)
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw under {root}: set {DATA_VARIABLE} to the folder that has it")
    return root
