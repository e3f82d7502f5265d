"""The one place that imports torchvision, whatever build of PyTorch it stands beside."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from ift_tune.base.errors import MissingDependencyError
from ift_tune.tasks.vision import torchvision_part

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


@needs_torchvision
def test_the_datasets_are_there_as_often_as_they_are_asked_for() -> None:
    datasets = torchvision_part("datasets")
    assert datasets.MNIST.__name__ == "MNIST"
    assert torchvision_part("datasets") is datasets


@needs_torchvision
def test_a_fresh_process_imports_it_too() -> None:
    code = (
        "from ift_tune.tasks.vision import torchvision_part as d\n"
        "assert d('datasets') is d('datasets')\n"
        "print(d('datasets').MNIST.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["MNIST"]


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ift_tune\[vision\]'"):
        torchvision_part("datasets")
