"""What the command line imports, and how long it takes to say something."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from ift_tune.cli import app

COMMANDS = sorted(getattr(typer.main.get_command(app), "commands"))  # noqa: B009  # typed privately
OLD_RUN = Path(__file__).parent.parent / "trial" / "old_runs" / "search" / "begun"
WATCHED = {
    "torch",
    "torchvision",
    "optuna",
    "ray",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
}
TRAINING = {"torch", "torchvision", "ray"}
SCRIPT = """
import json, os, sys
from ift_tune.cli import main

calls, imported = json.loads(sys.argv[1]), {}
for arguments in calls:
    sys.argv = ["ift-tune", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, arguments
    imported[" ".join(arguments)] = sorted({name.partition(".")[0] for name in sys.modules})
sys.stderr.write(json.dumps([imported, sum(os.times()[:2])]))
"""


def imports_of(*calls: list[str]) -> tuple[dict[str, frozenset[str]], float]:
    """Return which `WATCHED` are imported after each call of one process, and its CPU seconds."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, seconds = json.loads(done.stderr)
    return {call: frozenset(WATCHED & set(names)) for call, names in imported.items()}, seconds


def test_help_and_version_import_no_library_of_numbers_and_are_quick() -> None:
    imported, seconds = imports_of(["--version"], ["--help"])
    assert imported == {"--version": set(), "--help": set()}
    assert seconds <= 1.0


def test_no_command_imports_one_for_its_help() -> None:
    imported, _ = imports_of(*([name, "--help"] for name in COMMANDS))
    assert len(imported) == len(COMMANDS) == 9
    assert set(imported.values()) == {frozenset()}


def test_tasks_are_listed_without_torch() -> None:
    imported, _ = imports_of(["tasks"], ["tasks", "--json"])
    assert not imported["tasks --json"] & TRAINING


def test_figures_of_a_run_are_drawn_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    imported, _ = imports_of(["report", str(run)])
    assert (run / "curves.png").exists()
    assert not imported[f"report {run}"] & TRAINING
