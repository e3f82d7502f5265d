"""Callbacks that note which of their hooks run in which process: importable by workers and Ray."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from ift_tune import Callback, Hypergradient, JointOptimizer, MetaConfig
from ift_tune.base.status import Outcome
from ift_tune.joint.callbacks import RunFacts

JOINT_HOOKS = ("on_outer_step_begin", "on_hypergradient", "on_outer_step_end")


class Probe(Callback):
    """Each hook leaves a line in a file of its process; the last one adds a metric."""

    def __init__(self, notes: Path) -> None:
        notes.mkdir(parents=True, exist_ok=True)
        self._notes = notes

    def _note(self, hook: str) -> None:
        with (self._notes / str(os.getpid())).open("a") as file:
            file.write(f"{hook}\n")

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        self._note("on_outer_step_begin")

    def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
        self._note("on_hypergradient")

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        self._note("on_outer_step_end")
        metrics["ten_steps"] = 10.0 * joint.outer_steps

    def on_run_begin(self, run: RunFacts) -> None:
        assert run.finished <= run.total
        self._note("on_run_begin")

    def on_run_end(self) -> None:
        self._note("on_run_end")

    def on_search_end(self, name: str, finished: int, total: int) -> None:
        assert 0 < finished <= total
        self._note("on_search_end")

    def on_resources(self, text: str) -> None:
        self._note("on_resources")

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self._note("on_trial_begin")

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        assert row.get("ten_steps") in (10.0 * row["step"], None)
        self._note("on_trial_step")

    def on_retraining(self, number: int, inner_steps: int) -> None:
        self._note("on_retraining")

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        self._note("on_trial_end")


class Display(Callback):
    """Holds what cannot be pickled, as a terminal does, and counts rows."""

    def __init__(self) -> None:
        self._lock, self.rows = threading.Lock(), 0

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        with self._lock:
            self.rows += 1


def hooks_by_process(notes: Path) -> dict[int, Counter[str]]:
    """Return how often each hook ran in each process."""
    return {int(p.name): Counter(p.read_text().split()) for p in notes.iterdir()}


def check_hooks(
    notes: Path, steps: pd.DataFrame, *, apart: bool, resources: int, joint_steps: int | None = None
) -> None:
    """Check where hooks ran, each once an event, against the rows of the tables.

    Args:
        notes: What a `Probe` left.
        steps: The table; all its trials ran to their end and were trained again.
        apart: Whether trials run in processes of their own.
        resources: How often `on_resources` is expected.
        joint_steps: How many of the rows are of outer steps. Default: all.
    """
    found = hooks_by_process(notes)
    here = found.pop(os.getpid(), Counter())
    trials = len(steps.drop_duplicates(["arm", "seed", "trial"]))
    driver = {"on_resources": resources, "on_trial_begin": trials, "on_trial_step": len(steps)}
    driver["on_trial_end"] = trials
    driver |= {"on_run_begin": 1, "on_run_end": 1}
    searches = steps[["arm", "seed"]].drop_duplicates() if joint_steps is not None else ()
    driver["on_search_end"] = len(searches)
    retrainings = here.pop("on_retraining", 0)
    assert {hook: here.pop(hook, 0) for hook in driver} == driver
    assert retrainings == (trials if joint_steps is None else retrainings)
    joint_steps = len(steps) if joint_steps is None else joint_steps
    expected = dict.fromkeys(JOINT_HOOKS, joint_steps)
    if apart:
        assert not here
        assert dict(sum(found.values(), Counter())) == expected
    else:
        assert not found
        assert dict(here) == expected
    measured = steps.dropna(subset=["ten_steps"])
    assert len(measured) == joint_steps
    assert (measured["ten_steps"] == 10.0 * measured["step"]).all()
