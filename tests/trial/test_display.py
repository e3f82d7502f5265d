"""Progress in a notebook, on a terminal, and nowhere: what is shown, and when."""

from __future__ import annotations

import io
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from rich.console import Console
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import (
    Budget,
    Callback,
    Comparison,
    IFTObjective,
    Int,
    MetaSpace,
    Progress,
    UsageError,
    run_comparison,
    run_single,
    run_study,
)
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import RunFacts
from ift_tune.trial.screens import Notebook, Nowhere, Terminal, screen_here


class Cell:
    """Stands in for IPython's display: keeps each output, as it was shown last."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.updates = 0

    def __call__(self, shown: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.outputs.append(shown)
        place = len(self.outputs) - 1

        def update(again: dict[str, str], *, raw: bool) -> None:
            assert raw
            self.outputs[place] = again
            self.updates += 1

        return SimpleNamespace(update=update)

    def text(self) -> str:
        """Return the lines of the only output."""
        (output,) = self.outputs
        return output["text/plain"]


def facts(**changes: Any) -> RunFacts:
    aims = Objectives.of("search_error", None)
    whole = RunFacts(Path("out"), "toy", Budget(outer_steps=4), aims, 3, varied=("terms",))
    return replace(whole, **changes)


def ended(value: float | None, reason: StopReason = StopReason.DONE, **measured: Any) -> Outcome:
    return Outcome(reason, value, "search_error", {"step": 4, **measured})


def test_a_study_in_a_notebook_has_a_bar_for_all_and_a_line_a_trial(tmp_path: Path) -> None:
    cell = Cell()
    result = run_study(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=7,
        out=tmp_path / "run",
        config=CONFIG,
        device="cpu",
        callbacks=[Progress(screen=Notebook(cell))],
    )
    lines = cell.text().splitlines()
    assert result.best is not None
    assert lines[0] == "2 lines before"
    assert [line.split(" after")[0] for line in lines[1:6]] == [
        f"trial {n} done" for n in range(2, 7)
    ]
    best = f"best {result.best['metric']} {result.best['value']:.4g} (trial {result.best['trial']})"
    assert lines[6].startswith("trials  7 of 7")
    assert lines[6].endswith(best)
    assert '<progress value="7" max="7"></progress>' in cell.outputs[0]["text/html"]
    assert len(lines) == 7


def test_a_run_and_a_comparison_too_and_the_same_object_again(tmp_path: Path) -> None:
    cell = Cell()
    progress = Progress(screen=Notebook(cell))
    run_single(
        make_tiny, BUDGET, out=tmp_path / "one", config=CONFIG, device="cpu", callbacks=[progress]
    )
    assert cell.text().startswith("trial 0 done after 4 outer steps")
    comparison = Comparison(
        make_tiny,
        Budget(gradient_equivalents=60.0),
        config=CONFIG,
        trial_budget=Budget(outer_steps=2),
        training_steps=10,
        device="cpu",
    )
    cell.outputs.clear()
    run_comparison(
        comparison, out=tmp_path / "two", arms=["ift", "random"], seeds=1, callbacks=[progress]
    )
    first, second, whole = cell.text().splitlines()
    assert {first.split(": ")[1], second.split(": ")[1]} == {
        "ift with seed 0",
        "random with seed 0",
    }
    assert whole.startswith("searches  2 of 2")
    assert whole.endswith("outer steps")


def test_a_study_of_ones_own_has_its_trials_shown() -> None:
    cell = Cell()
    progress = Progress(screen=Notebook(cell))
    objective = IFTObjective(
        make_tiny, SPACE, BUDGET, config=CONFIG, device="cpu", callbacks=[progress]
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=2)
    texts = [output["text/plain"] for output in cell.outputs]
    assert [text.split(" after")[0] for text in texts] == ["trial 0 done", "trial 1 done"]


def test_threads_of_optuna_share_the_display() -> None:
    cell = Cell()
    progress, together = Progress(screen=Notebook(cell)), threading.Barrier(8)

    def trial(number: int) -> None:
        together.wait()
        progress.on_trial_begin(number, CONFIG, 0)
        together.wait()
        progress.on_trial_step(number, {"step": 1, "search_error": 0.5})
        progress.on_trial_end(number, ended(0.5))

    threads = [threading.Thread(target=trial, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cell.text().splitlines()[0] == "3 lines before"
    assert len(cell.text().splitlines()) == 6


def test_an_error_ends_the_display_and_the_next_run_begins_anew(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
            if row["step"] == 3:
                raise RuntimeError("a mistake of the user's")

    cell = Cell()
    progress = Progress(screen=Notebook(cell))
    hooks = [progress, Breaks()]
    with pytest.raises(RuntimeError, match="a mistake of the user's"):
        run_single(
            make_tiny, BUDGET, out=tmp_path / "one", config=CONFIG, device="cpu", callbacks=hooks
        )
    assert cell.text().startswith("trial 0 failed after")
    assert "<progress" not in cell.outputs[0]["text/html"]
    run_single(
        make_tiny, BUDGET, out=tmp_path / "two", config=CONFIG, device="cpu", callbacks=[progress]
    )
    assert len(cell.outputs) == 2


def test_a_call_that_is_refused_shows_nothing(tmp_path: Path) -> None:
    cell = Cell()
    with pytest.raises(UsageError):
        run_study(
            make_tiny,
            MetaSpace({"user.missing": Int(1, 2)}),
            BUDGET,
            n_trials=1,
            out=tmp_path,
            metric="search_nonsense",
            device="cpu",
            callbacks=[Progress(screen=Notebook(cell))],
        )
    assert cell.outputs == []


@pytest.mark.parametrize(
    ("changes", "ends", "best"),
    [
        ({}, [ended(0.5), ended(0.25), ended(None, StopReason.DIVERGED)], "best search_error 0.25"),
        ({}, [ended(0.1, StopReason.PRUNED)], ""),
        ({"finished": 2, "total": 9}, [ended(0.5)], "best of these search_error 0.5"),
        (
            {"objectives": Objectives.of("search_error", None, ["alpha_lambda_max<=2"])},
            [ended(0.25, alpha_lambda_max=3.0), ended(0.5, alpha_lambda_max=1.0)],
            "best search_error 0.5 (trial 1)",
        ),
        (
            {"objectives": Objectives.of(["search_error", "hvps"], None)},
            [ended(0.5, hvps=9.0), ended(0.5, hvps=3.0)],
            "best search_error 0.5 (trial 1)",
        ),
    ],
)
def test_the_best_is_the_one_that_the_search_will_name(
    changes: dict[str, Any], ends: list[Outcome], best: str
) -> None:
    cell = Cell()
    progress = Progress(screen=Notebook(cell))
    progress.on_run_begin(facts(**changes))
    for number, outcome in enumerate(ends):
        progress.on_trial_begin(number, CONFIG, 0)
        progress.on_trial_end(number, outcome)
    progress.on_run_end()
    whole = cell.text().splitlines()[-1]
    done = changes.get("finished", 0) + len(ends)
    assert whole.startswith(f"trials  {done} of {changes.get('total', 3)}")
    assert (best in whole) if best else ("best" not in whole)


def test_texts_of_users_are_no_markup_in_a_notebook() -> None:
    cell = Cell()
    progress = Progress(screen=Notebook(cell))
    progress.on_run_begin(facts(total=2))
    progress.on_resources("<b>2 workers</b>")
    progress.on_trial_begin(0, CONFIG, 0)
    progress.on_trial_step(0, {"step": 1, "search_<i>": 0.5})
    progress.on_run_end()
    assert "<b>" not in cell.outputs[0]["text/html"]
    assert "&lt;b&gt;2 workers&lt;/b&gt;" in cell.outputs[0]["text/html"]


def test_a_notebook_is_not_flooded_and_shows_the_last_state() -> None:
    cell = Cell()
    progress = Progress(screen=Notebook(cell))
    progress.on_run_begin(facts(total=2))
    progress.on_trial_begin(0, CONFIG, 0)
    for step in range(1, 5001):
        progress.on_trial_step(0, {"step": step, "search_error": 1.0 / step})
    progress.on_retraining(0, 1234)
    assert cell.updates < 1000
    assert "retraining for 1,234 steps" in cell.text()
    for number in range(1, 12):
        progress.on_trial_begin(number, CONFIG, 0)
    progress.on_retraining(0, 1234)
    assert cell.text().splitlines()[-1] == "and 5 more at work"
    progress.on_run_end()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_bars_and_anything_else_nothing(
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    screen = screen_here()
    assert type(screen) is (Terminal if terminal else Nowhere)
    run_study(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=1,
        out=tmp_path / "run",
        config=CONFIG,
        device="cpu",
        callbacks=[Progress()],
    )
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("trial 0 done" in printed.err) is terminal


def test_a_kernel_is_told_from_ipython_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell()
    for shell, kind in ((SimpleNamespace(kernel=object()), Notebook), (SimpleNamespace(), Nowhere)):
        ipython = SimpleNamespace(
            get_ipython=lambda s=shell: s, display=SimpleNamespace(display=cell)
        )
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert type(screen_here()) is kind


def test_the_bars_of_a_terminal_leave_their_lines() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    progress = Progress(screen=Terminal(console))
    for _ in range(2):  # the same object again
        progress.on_run_begin(facts(total=2))
        progress.on_trial_begin(0, CONFIG, 0)
        progress.on_trial_end(0, ended(0.25))
        progress.on_run_end()
    assert file.getvalue().count("trial 0 done after 4 outer steps: search_error=0.25") == 2
