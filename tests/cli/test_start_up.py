"""What the command line imports, and how long it takes to say something."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
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
sys.modules.update(dict.fromkeys(json.loads(sys.argv[2])))  # as if they were not installed
for arguments in calls:
    sys.argv = ["ift-tune", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, arguments
    imported[" ".join(arguments)] = sorted({name.partition(".")[0] for name in sys.modules})
sys.stderr.write(json.dumps([imported, sum(os.times()[:2])]))
"""


LIBRARIES = {"optuna", "ray", "cmaes", "torchvision", "matplotlib", "jinja2"}
"""What the extras bring."""


def imports_of(
    *calls: list[str], without: Iterable[str] = ()
) -> tuple[dict[str, frozenset[str]], float]:
    """Return which `WATCHED` are imported after each call of one process, and its CPU seconds."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(calls), json.dumps(list(without))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, seconds = json.loads(done.stderr.splitlines()[-1])
    return {call: frozenset(WATCHED & set(names)) for call, names in imported.items()}, seconds


def test_help_and_version_import_no_library_of_numbers_and_are_quick() -> None:
    imported, seconds = imports_of(["--version"], ["--help"])
    assert imported == {"--version": set(), "--help": set()}
    assert seconds <= 1.0


def test_no_command_imports_one_for_its_help() -> None:
    imported, _ = imports_of(*([name, "--help"] for name in COMMANDS))
    assert len(imported) == len(COMMANDS) == 13
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


@pytest.mark.nightly
@pytest.mark.parametrize("drawing", [False, True])
def test_one_run_needs_no_extra_but_the_one_that_draws(tmp_path: Path, drawing: bool) -> None:
    if drawing:
        pytest.importorskip("matplotlib")
    run, study = str(tmp_path / "run"), str(tmp_path / "study")
    small, one = ["--set", "inner_steps=2"], ["--seeds", "1", "--outer-steps", "1"]
    calls = [
        ["run", "digits-weight-decay", "--outer-steps", "2", *small, "--out", run, "--quiet"],
        ["report", run],
        [
            "study-validation",
            "--totals",
            "100",
            "--fractions",
            ".5",
            *one,
            "--out",
            study,
            "--quiet",
        ],
    ]
    imports_of(*calls, without=LIBRARIES - {"matplotlib"} if drawing else LIBRARIES)
    assert (tmp_path / "run" / "steps.csv").exists()
    assert (tmp_path / "run" / "curves.png").exists() == drawing
