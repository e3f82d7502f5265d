"""Whose a search is when its process is gone, and what a search in progress counts for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparisons import comparison, make_clouds, run

from ift_tune import MetaConfig, UsageError, load_results
from ift_tune.base.errors import Interrupted
from ift_tune.base.interrupt import Interrupt
from ift_tune.compare.arms import ARMS
from ift_tune.compare.cell import Cell
from ift_tune.compare.findings import find
from ift_tune.compare.work import ComparisonWork
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.joint.callbacks import Callback
from ift_tune.problem.batches import Batch
from ift_tune.search.work import Worker


class StopAfter(Callback):
    """Asks to stop after some outer steps."""

    def __init__(self, interrupt: Interrupt, steps: int) -> None:
        self._interrupt, self._left = interrupt, steps

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self._left -= 1
        self._interrupt.requested = self._left <= 0


@pytest.mark.parametrize("arm", ["ift", "random"])
def test_a_worker_takes_up_what_another_of_its_session_has_left(arm: str, tmp_path: Path) -> None:
    whole = comparison(60.0)
    facts = {"run_id": "x", "task": "custom"}
    work = ComparisonWork(whole, (Cell(ARMS[arm], 0),), tmp_path, facts, "cpu")
    interrupt = Interrupt()
    with pytest.raises(Interrupted):
        work.do(Worker("s", 0), [StopAfter(interrupt, 2)], interrupt, lambda _: None)
    assert work.unfinished() == [0]
    # Worker 1 was hired before worker 0 died: it does not know.
    on_done: list[int] = []
    work.do(Worker("s", 1), [], Interrupt(), on_done.append)
    assert (on_done, work.unfinished()) == ([0], [])
    trials = load_results(tmp_path).trials
    assert set(trials["status"]) <= {"complete", "pruned"}
    undisturbed = run(whole, tmp_path / "undisturbed", arm).trials
    assert list(trials["gradient_equivalents"]) == list(undisturbed["gradient_equivalents"])


def test_a_trial_in_progress_does_not_count(tmp_path: Path) -> None:
    results = run(comparison(60.0), tmp_path / "run", "ift", "random", seeds=2)
    before = find(results)
    assert sorted(before.chosen["arm"]) == ["ift", "ift", "random", "random"]
    for table in results:
        table.loc[(table["arm"] == "ift") & (table["seed"] == 1), "status"] = "interrupted"
    now = find(results)
    assert sorted(now.chosen["arm"]) == ["ift", "random", "random"]
    assert now.against[0].we_lack == 1


class NoLoss(ClassificationProblem):
    """Reports something else than a loss or an error."""

    def metrics(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"brier": super().metrics(batch)["loss"]}


def make_without_loss(config: MetaConfig, device: torch.device, seed: int) -> NoLoss:
    problem = make_clouds(config, device, seed)
    return NoLoss(problem.model, problem.hyper, problem.splits)


def test_what_is_not_measured_is_said_before_anything_runs(tmp_path: Path) -> None:
    whole = comparison(60.0, problem_factory=make_without_loss)
    with pytest.raises(UsageError, match="choose a metric from search_brier"):
        run(whole, tmp_path / "run", "ift")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.json"))
    named = comparison(60.0, problem_factory=make_without_loss, metric="search_brier")
    found = find(run(named, tmp_path / "named", "ift", "none"))
    assert (found.metric, found.measure) == ("search_brier", "brier")
    assert len(found.chosen) == 2


def test_an_unknown_backend_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'ray'"):
        run(comparison(), tmp_path / "run", "none", backend="rai")
