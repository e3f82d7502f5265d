"""Tasks are listed without PyTorch: importing it takes longer than anything a list says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ift_tune
from ift_tune.tasks import TASKS

CODE = """
import json, sys, types

root = types.ModuleType("ift_tune")  # the root alone, whatever it imports
root.__path__ = [sys.argv[1]]
sys.modules["ift_tune"] = root
from ift_tune import tasks

facts = {t.name: [t.describe(), t.options(), dict(t.settings)] for t in tasks.TASKS.values()}
tasks.get("text-dropout", embedded=True, options={"rate": 0.2})
print(json.dumps([facts, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_listing_imports_no_library_of_numbers() -> None:
    (home,) = ift_tune.__path__
    command = [sys.executable, "-c", CODE, str(Path(home))]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    facts, modules = json.loads(found.stdout)
    assert not {"torch", "numpy", "pandas", "sklearn", "torchvision"} & set(modules)
    assert facts == {
        name: [task.describe(), task.options(), dict(task.settings)] for name, task in TASKS.items()
    }
