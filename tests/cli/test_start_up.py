"""What the command line imports, and how long it takes to say something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from command_line import Call

from ift_tune.cli import app

COMMANDS = sorted(getattr(typer.main.get_command(app), "commands"))  # noqa: B009  # typed privately
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
    calls = [[name, "--help"] for name in COMMANDS if name != "compare"]
    imported, _ = imports_of(*calls, ["compare", "--help"])  # which reads the registry of arms
    assert len(imported) == len(COMMANDS) == 9
    arms = imported.pop("compare --help")
    assert set(imported.values()) == {frozenset()}
    assert not arms & TRAINING


def test_tasks_are_listed_without_torch() -> None:
    imported, _ = imports_of(["tasks"], ["tasks", "--json"])
    assert not imported["tasks --json"] & TRAINING


def test_figures_of_a_run_are_drawn_without_torch(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = ("run", "digits-weight-decay", "--outer-steps", "1", "--device", "cpu", "--out", "run")
    assert call(*run, "--set", "inner_steps=1", "--quiet").status == 0
    imported, _ = imports_of(["report", "run"])
    assert (tmp_path / "run" / "curves.png").exists()
    assert not imported["report run"] & TRAINING


def test_ray_is_told_to_keep_to_this_machine_before_it_is_imported() -> None:
    code = (
        "import os, sys\n"
        "from ift_tune.cli.search import options_of\n"
        "options_of('ray', gpus_per_trial=None, optuna={}, ray={})\n"
        "print('ray' in sys.modules, os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'])"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables
    )
    assert done.stdout.split() == ["False", "0"]
