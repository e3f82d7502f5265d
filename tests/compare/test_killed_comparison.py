"""Real processes of ``ift-tune compare``, killed at random moments and resumed; its errors."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from processes import Ended, finish, ift_tune, rows_in
from tiny_comparisons import assert_same_tables, comparison, make_slow, run

from ift_tune import load_results

HERE = Path(__file__).parent
TASK = "tiny_comparisons:make_slow"
CONFIG = ["terms=1", "meta_lr=0.1", "inner_steps=2", "inner_lr=0.1"]
ARMS = ["ift", "asha", "none"]
COMMON = [
    *(part for setting in CONFIG for part in ("--set", setting)),
    *("--arms", ",".join(ARMS), "--budget", "60", "--training-steps", "6", "--outer-steps", "3"),
    *("--metric", "search_loss", "--device", "cpu", "--quiet", "--seeds", "1"),
]


def rows(out: Path) -> int:
    """Return how many steps have been written."""
    return rows_in(*out.glob("cells/*/trial-*"))


def hit(out: Path, number: signal.Signals, after: int, pause: float, *more: str) -> Ended:
    """Start a process and send it a signal some rows and a pause later."""
    before = rows(out)
    environment = {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = ["compare", TASK, *COMMON, "--out", str(out), *more]
    with ift_tune(*command, environment=environment) as process:
        return process.hit(number, lambda: rows(out) - before >= after, pause)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same comparison by the function that the command calls, in this process."""
    whole = replace(comparison(60.0), problem_factory=make_slow, task="tiny_comparisons.make_slow")
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(whole, out, *ARMS)
    return out


def test_killed_and_interrupted_and_resumed(undisturbed: Path, tmp_path: Path) -> None:
    generator, out, total = random.Random(7), tmp_path / "run", rows(undisturbed)
    after, pause = generator.randint(1, total // 4), generator.uniform(0.0, 0.05)
    assert hit(out, signal.SIGKILL, after, pause) == (-signal.SIGKILL, "", "")
    assert 0 < len(load_results(out).steps) < total  # what there is can be read
    interrupted = hit(out, signal.SIGINT, total // 4, 0.01, "--resume")
    assert interrupted.status == 130
    (line,) = interrupted.stderr.splitlines()
    assert f"--out {out} --resume" in line
    results = load_results(out)
    assert len(results.steps) < total
    assert (results.trials["status"] == "interrupted").sum() <= 1
    assert (out / "trials.parquet").exists()
    assert finish("compare", TASK, *COMMON, "--out", str(out), "--resume") == 0
    assert_same_tables(out, undisturbed)


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (["--arms", "ift,randon"], "there is no arm 'randon'"),
        (["--arms", "ift,ift"], "each once"),
        (["--arms", ","], "name some arms"),
        (["--budget", "60", "--seconds", "3"], "--budget or --seconds, not both"),
        (["--seeds", "0"], "seeds must be an integer of at least 1"),
        (["--seeds", "-3"], "seeds must be an integer of at least 1"),
        (["--budget", "-5"], "gradient_equivalents must be a finite number above 0"),
        (["--budget", "0"], "gradient_equivalents must be a finite number above 0"),
        (["--budget", "nan"], "gradient_equivalents must be a finite number above 0"),
        (["--seconds", "-5"], "seconds must be a finite number above 0"),
        (["--workers", "0"], "workers must be an integer of at least 1"),
        (["--training-steps", "-1"], "training_steps must be"),
        (["--training-steps", "0"], "training_steps must be"),
        (["--outer-steps", "0"], "outer_steps must be"),
        (["--budget", "many"], "budget"),
        (["--metric", "search_nothing"], "search_nothing is not measured"),
        (["--backend", "nobody"], "unknown backend"),
        (["--set", "nothing=1"], "nothing is not a meta-hyperparameter"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(
    arguments: list[str], mend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--device", "cpu", "--quiet", "--out", str(tmp_path / "run"), "--training-steps", "4"]
    limit = [] if {"--budget", "--seconds"} & {*arguments} else ["--budget", "10"]
    assert finish("compare", TASK, *own, *limit, *arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert mend in line
    assert captured.out == ""


def test_another_budget_is_refused_on_resumption(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [TASK, *COMMON, "--out", str(undisturbed)]
    assert finish("compare", *again, "--resume", "--budget", "61") == 2
    assert "was begun with another budget" in capsys.readouterr().err
    assert finish("compare", *again) == 2
    assert "already holds files" in capsys.readouterr().err
