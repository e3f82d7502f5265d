"""What the command line says of itself: what to try, what is accepted, how a shell completes it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from command_line import Call

from ift_tune import MetaConfig, tasks
from ift_tune.base.environment import resolve_device
from ift_tune.cli import app, values
from ift_tune.cli.configured import ConfiguredCommand
from ift_tune.compare.arms import ARMS
from ift_tune.search import backends, fidelity, pruners, samplers
from ift_tune.studies import worth, worth_cells
from ift_tune.trial import refit
from ift_tune.trial.tables import COST_COLUMNS, METRIC_COLUMNS

COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
EXAMPLES = [
    (name, line)
    for name, command in COMMANDS.items()
    for line in command.epilog.split("\n\n")
    if line.startswith("ift-tune ")
]
MODULE = """
from ift_tune.testing.problems import Quadratic

def make_problem(config, device, seed):
    return Quadratic(seed=seed)
"""


def test_alone_it_says_what_to_try(call: Call) -> None:
    ended = call()
    assert (ended.status, ended.err) == (0, "")
    tried = re.findall(r"^  (ift-tune .*?)(?:  |$)", ended.out, flags=re.MULTILINE)
    assert len(tried) == 3
    Path("mine.py").write_text(MODULE)
    for line in tried:
        assert call(*shlex.split(line)[1:], "--dump-config").status == 0, line


def test_each_command_has_an_example_that_it_takes(call: Call) -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)
    Path("mine.py").write_text(MODULE)
    for name, line in EXAMPLES:
        words = shlex.split(line)[1:]
        assert words[0] in COMMANDS
        if isinstance(COMMANDS[words[0]], ConfiguredCommand):
            ended = call(*words, "--dump-config")
            assert (ended.status, ended.err) == (0, ""), (line, ended)
        help_text = " ".join(call(name, "--help").out.split())
        assert " ".join(line.split()) in help_text


def test_the_words_are_those_that_are_accepted() -> None:
    assert set(values.KEYS) == set(MetaConfig.flat_keys())
    assert set(values.SAMPLERS) == set(samplers.SAMPLERS)
    assert set(values.PRUNERS) == set(pruners.PRUNERS)
    assert set(values.SCHEDULERS) == set(backends.SCHEDULERS)
    assert set(values.FIDELITIES) == set(fidelity.FIDELITIES)
    assert set(values.REFIT_DATA) == set(refit.DATA)
    assert set(values.WORTH_DATA) == set(worth.DATA)
    assert set(values.WORTH_JOBS) == set(worth_cells.JOBS)
    assert set(values.METRICS) <= set(METRIC_COLUMNS)
    assert set(values.COSTS) <= set(COST_COLUMNS)
    assert resolve_device(values.DEVICES[0]).type in values.DEVICES


@pytest.mark.parametrize(
    ("command", "flag", "known"),
    [
        ("search", "--sampler", values.SAMPLERS),
        ("search", "--pruner", values.PRUNERS),
        ("search", "--scheduler", values.SCHEDULERS),
        ("search", "--searcher", values.SEARCHERS),
        ("search", "--fidelity", values.FIDELITIES),
        ("search", "--backend", values.BACKENDS),
        ("search", "--mode", values.MODES),
        ("search", "--set", values.KEYS),
        ("run", "--device", values.DEVICES),
        ("run", "--metric", values.METRICS),
        ("compare", "--backend", values.BACKENDS),
        ("compare", "--arms", tuple(ARMS)),
        ("refit", "--data", values.REFIT_DATA),
        ("study-worth", "--data", values.WORTH_DATA),
        ("study-worth", "--jobs", values.WORTH_JOBS),
        ("study-worth", "--arms", tuple(ARMS)),
    ],
)
def test_the_help_of_an_option_lists_what_it_accepts(
    command: str, flag: str, known: tuple[str, ...]
) -> None:
    (param,) = (p for p in COMMANDS[command].params if flag in p.opts)
    assert [word for word in known if word not in re.findall(r"[\w+-]+", param.help)] == []


@pytest.fixture
def completed(call: Call, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what a shell is offered for the last word of a line."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_IFT_TUNE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        number = len(line.split()) - (0 if line.endswith(" ") else 1)
        monkeypatch.setenv("COMP_CWORD", str(number))
        ended = call()
        assert (ended.status, ended.err) == (0, "")
        found: list[str] = ended.out.split()
        return found

    return complete


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ift-tune cer", {"certify"}),
        ("ift-tune study-", {f"study-{w}" for w in ("inverse", "cost", "validation", "worth")}),
        ("ift-tune run ", set(tasks.TASKS)),
        ("ift-tune search digits-c", {n for n in tasks.TASKS if n.startswith("digits-c")}),
        ("ift-tune search digits-cleaning --sampler n", {"nsgaii", "nsgaiii"}),
        ("ift-tune run x --set inner_l", {"inner_lr="}),
        ("ift-tune search x --vary meta_", {"meta_lr=", "meta_optimizer="}),
        ("ift-tune compare x --arms ift,rand", {"ift,random", "ift,random+val"}),
        ("ift-tune compare x --arms tpe,tp", set()),
        ("ift-tune run x --metric search_e", {"search_error"}),
        ("ift-tune search x --metric grad", {"gradient_equivalents"}),
        ("ift-tune search x --constraint hvp", {"hvps<="}),
        ("ift-tune refit runs --data train+", {"train+val"}),
        ("ift-tune run x --conf", {"--config"}),
        ("ift-tune run x --config nowhere.yaml --dump", {"--dump-config"}),
        ("ift-tune run x --config nowhere.yaml --device c", {"cpu", "cuda"}),
    ],
)
def test_a_shell_is_offered_what_fits(completed: Any, line: str, offered: set[str]) -> None:
    found = completed(line)
    assert set(found) == offered
    assert len(found) == len(offered)


def test_the_script_for_a_shell_asks_this_command(tmp_path: Path) -> None:
    environment = {**os.environ, "_IFT_TUNE_COMPLETE": "source_bash"}
    command = [sys.executable, "-m", "ift_tune"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "_IFT_TUNE_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default -F" in done.stdout
    assert done.stdout.rstrip().endswith("ift-tune")
