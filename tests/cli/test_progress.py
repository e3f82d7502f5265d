"""What a run shows while it goes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ift_tune import Budget, MetaConfig, Neumann, Progress
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import Outcome, StopReason
from ift_tune.cli.progress import describe_metrics, progress_unless
from ift_tune.joint.callbacks import RunFacts, during
from ift_tune.trial.screens import Terminal

CONFIG = MetaConfig(inverse=Neumann(terms=7, alpha=0.012345678), meta_lr=0.1)
ROW: dict[str, Any] = {
    "step": 1,
    "train_loss": 1.5,
    "train_error": 0.5,
    "val_loss": 2.5,
    "val_error": 0.25,
    "search_loss": 0.123456,
    "test_error": None,
}


@contextlib.contextmanager
def running(
    progress: Progress,
    budget: Budget | None = None,
    varied: tuple[str, ...] = (),
    *,
    searches: bool = False,
) -> Iterator[Progress]:
    """Tell a display what a run, a search or a comparison tells it at its begin and at its end."""
    objectives = Objectives.of(None, None)
    total = 4 if searches else 1
    facts = RunFacts(Path("out"), "task", budget, objectives, total, 0, varied, searches)
    with during([progress], facts):
        yield progress


def on(console: Console) -> Progress:
    return Progress(screen=Terminal(console))


def shown(
    steps: int,
    *,
    budget: Budget,
    varied: tuple[str, ...] = (),
    terminal: bool = False,
    first: int = 0,
    outcome: Outcome | None = None,
) -> list[str]:
    """Return the lines that a trial of some steps prints."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200)
    with running(on(console), budget, varied) as progress:
        progress.on_trial_begin(4, CONFIG, first)
        for step in range(first + 1, steps + 1):
            progress.on_trial_step(4, ROW | {"step": step})
        if outcome is not None:
            progress.on_trial_end(4, outcome)
    return file.getvalue().splitlines()


def ended(reason: StopReason, value: float | None, steps: int) -> Outcome:
    return Outcome(reason, value, "search_error", {"step": steps})


@pytest.mark.parametrize(
    ("budget", "steps", "lines"),
    [
        (Budget(outer_steps=5), 5, [1, 2, 3, 4, 5]),
        (Budget(outer_steps=50), 14, [5, 10]),
        (Budget(seconds=9.0), 45, [20, 40]),
    ],
)
def test_off_a_terminal_a_run_prints_a_line_every_tenth_of_the_way(
    budget: Budget, steps: int, lines: list[int]
) -> None:
    printed = shown(steps, budget=budget)
    assert [line.split(":")[0] for line in printed] == [f"outer step {n}" for n in lines]
    assert printed[0].endswith("train_error 0.5  val_error 0.25  search_loss 0.1235")


def test_a_search_prints_a_line_a_trial_with_its_point() -> None:
    outcome = ended(StopReason.DONE, 0.0625, 3)
    printed = shown(3, budget=Budget(outer_steps=3), varied=("alpha", "terms"), outcome=outcome)
    assert printed == [
        "trial 4 done after 3 outer steps: search_error=0.0625  alpha=0.01235 terms=7"
    ]


def test_a_trial_without_a_value_says_why_it_ended() -> None:
    outcome = ended(StopReason.NONFINITE, None, 2)
    printed = shown(0, budget=Budget(outer_steps=3), varied=("damping",), outcome=outcome)
    assert printed == ["trial 4 nonfinite after 2 outer steps  damping=None"]


def test_a_resumed_trial_says_where_it_goes_on() -> None:
    printed = shown(2, first=2, budget=Budget(outer_steps=9), varied=("alpha",))
    assert printed == ["trial 4 resumed after outer step 2"]


def test_several_trials_in_a_row_print_one_line_each() -> None:
    file = io.StringIO()
    console = Console(file=file, width=200)
    with running(on(console), Budget(outer_steps=1), ("terms",)) as progress:
        for number in range(3):
            progress.on_trial_begin(number, CONFIG, 0)
            progress.on_trial_step(number, ROW)
            progress.on_trial_end(number, ended(StopReason.DONE, 0.5, 1))
    starts = [line.split(" after")[0] for line in file.getvalue().splitlines()]
    assert starts == ["trial 0 done", "trial 1 done", "trial 2 done"]


def test_on_a_terminal_there_is_a_bar_and_no_line_a_step() -> None:
    outcome = ended(StopReason.DONE, 0.5, 10)
    text = "\n".join(
        shown(10, budget=Budget(outer_steps=10), terminal=True, first=2, outcome=outcome)
    )
    assert "outer step 5" not in text
    assert "/10" in text
    assert "trial 4 done after 10 outer steps: search_error=0.5" in text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (ROW, "train_error 0.5  val_error 0.25  search_loss 0.1235"),
        ({"val_loss": 12345.678, "test_loss": 1e-9}, "val_loss 1.235e+04  test_loss 1e-09"),
        ({}, ""),
    ],
)
def test_errors_are_shown_where_they_are_measured_else_losses(
    row: dict[str, Any], text: str
) -> None:
    assert describe_metrics(row) == text


def test_a_comparison_prints_a_line_a_search() -> None:
    file = io.StringIO()
    with running(on(Console(file=file, width=200)), searches=True) as progress:
        progress.on_resources("2 workers, 1 core each")
        for step in (1, 2):
            progress.on_trial_step(0, ROW | {"step": step})
        progress.on_search_end("ift-0", 1, 4)
    assert file.getvalue().splitlines() == ["2 workers, 1 core each", "1 of 4: ift-0"]


def test_a_quiet_console_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with running(progress_unless(quiet=True), searches=True) as progress:
        progress.on_search_end("ift-0", 1, 4)
    assert capsys.readouterr() == ("", "")
    with running(progress_unless(quiet=False), searches=True) as progress:
        progress.on_search_end("ift-0", 1, 4)
    assert capsys.readouterr() == ("", "1 of 4: ift-0\n")


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    row = {"step": 1, "search_f1[/macro]": 0.5, "test_[bold]:smile:": 0.25}
    for terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=200)
        with running(on(console), Budget(outer_steps=1)) as progress:
            progress.on_trial_begin(0, MetaConfig(), 0)
            progress.on_trial_step(0, row)
            metrics = {"step": 1}
            outcome = Outcome(StopReason.DONE, 0.5, "search_f1[/macro]", metrics, "max")
            progress.on_trial_end(0, outcome)
        assert "search_f1[/macro]=0.5" in file.getvalue()
        assert ("search_f1[/macro] 0.5  test_[bold]:smile: 0.25" in file.getvalue()) or terminal
