"""A report is made without PyTorch, which takes longer to import than a page to draw."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ift_tune.trial.tables import Results
from report.comparisons import part, saved

SCRIPT = """
import sys
from ift_tune.cli import main

for directory in ("comparison", "run"):
    sys.argv = ["ift-tune", "report", directory]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, directory
    heavy = {"torch", "torchvision", "ray"} & set(sys.modules)
    assert not heavy, (directory, heavy)
"""


@pytest.mark.nightly
def test_comparison_and_run_are_reported_without_it(
    comparison: Path, results: Results, tmp_path: Path
) -> None:
    saved(part(arms=("ift", "random"), seeds=1)(results), tmp_path / "comparison")
    shutil.copytree(comparison / "cells" / "ift-0000", tmp_path / "run")  # as a run of its own
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "comparison" / "figures" / "learned.svg").exists()
    assert (tmp_path / "comparison" / "figures" / "importance.svg").exists()
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) >= 1
