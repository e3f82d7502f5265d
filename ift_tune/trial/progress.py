"""How far a run is: a callback that shows bars in a notebook and on a terminal."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from ift_tune.base.direction import Direction
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.budget import Budget
from ift_tune.joint.callbacks import Callback, RunFacts
from ift_tune.joint.config import MetaConfig
from ift_tune.trial.screens import Screen, screen_here
from ift_tune.trial.training import EVALUATIONS

_SHOWN = ("train", "val", "search", "test")


class Progress(Callback):
    """Shows how far a run, a search or a comparison is: ``callbacks=[ift_tune.Progress()]``.

    In a notebook it shows bars below the cell, on a terminal in its last lines (on standard error);
    where there is neither, nothing. A bar for each trial at work, with its latest errors, one
    for the whole search with the best value so far, and a line for each trial that has ended.
    A comparison has a bar for its searches. The hooks run in the process that was called, wherever
    trials run: in workers, or with Ray. One object can be used for several runs, one after the
    other.

    Args:
        screen: Where to show it. Default: as above.

    Example:
        >>> from ift_tune import Budget, Progress, run_single, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> outcome = run_single(
        ...     problem, Budget(outer_steps=3), out="runs/mine", device="cpu",
        ...     callbacks=[Progress()],
        ... )
        >>> outcome.stop_reason.value
        'done'
    """

    def __init__(self, *, screen: Screen | None = None) -> None:
        self._given = self._screen = screen
        self._open, self._lock = 0, threading.RLock()
        self._forget()

    def _forget(self) -> None:
        """Know nothing of a run, as before the first."""
        self._run: RunFacts | None = None
        self._counts_searches = False  # then trials have no bars: they share their numbers
        self._budget: Budget | None = None
        self._varied: tuple[str, ...] = ()
        self._running: dict[int, _Running] = {}
        self._whole: int | None = None
        self._plain: int | None = None
        self._finished = self._steps = 0
        self._best: _Best | None = None

    def on_run_begin(self, run: RunFacts) -> None:
        """Begin the display, with a bar for the whole where it has several parts."""
        self._begin()
        self._run, self._budget, self._varied = run, run.budget, run.varied
        self._counts_searches = run.searches
        self._finished = run.finished
        if run.searches or run.total > 1:
            label = "searches" if run.searches else "trials"
            self._whole = self.screen.add(label, run.total, run.finished)

    def on_run_end(self) -> None:
        """End it."""
        for number in list(self._running):
            self._remove(number)
        if self._plain is not None:
            self.screen.remove(self._plain)
        self._end()
        self._forget()

    def on_resources(self, text: str) -> None:
        """Say what the trials are given."""
        self.screen.say(text)

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        """Begin a bar, in place of the one of a process that died at the trial."""
        if self._counts_searches:
            return
        with self._lock:  # Optuna's n_jobs are threads
            if self._run is None and not self._running:  # in a study of the user's own
                self._begin()
            self._remove(number)
            flat = config.to_flat()
            point = " ".join(f"{key}={_short(flat.get(key))}" for key in self._varied)
            if first_step:
                self.screen.say(f"trial {number} resumed after outer step {first_step}")
            total = None if self._budget is None else self._budget.outer_steps
            bar = self.screen.add(f"trial {number}", total, first_step)
            self._running[number] = _Running(bar, point)

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Advance the bar; where there are none, write a line every tenth of the way."""
        if self._counts_searches:
            self._steps += 1
            self._show_whole(state=f"{self._steps:,} outer steps")
            return
        state = describe_metrics(row)
        self.screen.update(self._running[number].bar, completed=row["step"], state=state)
        planned = None if self._budget is None else self._budget.outer_steps
        every = max(1, (planned or 200) // 10)
        if not self._varied and not self.screen.live and row["step"] % every == 0:
            self.screen.say(f"outer step {row['step']}: {state}")

    def on_retraining(self, number: int, inner_steps: int) -> None:
        """Say what takes so long."""
        if number in self._running:  # with Ray, the trial may have ended by now
            state = f"retraining for {inner_steps:,} steps, λ frozen"
            self.screen.update(self._running[number].bar, state=state, now=True)

    def on_baseline_step(self, row: dict[str, Any]) -> None:
        """Show how far the plain training beside the run is."""
        if self._plain is None:
            self.screen.say("plain training beside it, with λ as the factory sets it")
            self._plain = self.screen.add("plain training", EVALUATIONS)
        self.screen.update(self._plain, completed=row["step"], state=describe_metrics(row))

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Replace the bar by a line."""
        if self._counts_searches:
            return
        value = "" if outcome.value is None else f": {outcome.metric}={outcome.value:.4g}"
        steps = outcome.metrics.get("step", 0)
        with self._lock:
            point = self._remove(number)
            self.screen.say(
                f"trial {number} {outcome.stop_reason.value} after {steps} outer steps{value}"
                f"{'  ' + point if point else ''}"
            )
            self._note(number, outcome)
            if self._run is None and not self._running:
                self._end()

    def on_search_end(self, name: str, finished: int, total: int) -> None:
        """Say which search has ended."""
        self._finished = finished
        self.screen.say(f"{finished} of {total}: {name}")
        self._show_whole(completed=finished, total=total)

    @property
    def screen(self) -> Screen:
        """Where it is shown; looked for at the first use, in the process that shows it."""
        if self._screen is None:
            self._screen = screen_here()
        return self._screen

    def _begin(self) -> None:
        if self._open == 0:
            self.screen.open()
        self._open += 1

    def _end(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.screen.close()
            self._screen = self._given

    def _note(self, number: int, outcome: Outcome) -> None:
        """Count a trial, and keep the best."""
        if outcome.stop_reason is StopReason.INTERRUPTED:
            return
        self._finished += 1
        losses = self._losses(outcome)
        if losses and (self._best is None or losses < self._best.losses):
            self._best = _Best(losses, number, outcome)
        self._show_whole(completed=self._finished, state=self._words_of_best())

    def _losses(self, outcome: Outcome) -> list[float]:
        """Return what a trial is compared by, less being better; nothing if it cannot be best."""
        if outcome.stop_reason is not StopReason.DONE or outcome.value is None:
            return []
        first = Direction(outcome.mode).sign * outcome.value
        if self._run is None:
            return [first]
        aims = self._run.objectives
        kept = all(excess <= 0.0 for excess in aims.violations(outcome.metrics).values())
        return [first, *aims.further_losses(outcome.metrics)] if kept else []

    def _words_of_best(self) -> str | None:
        if self._best is None:
            return None
        since = "best of these" if self._run is not None and self._run.finished else "best"
        outcome = self._best.outcome
        return f"{since} {outcome.metric} {outcome.value:.4g} (trial {self._best.number})"

    def _show_whole(self, **changes: Any) -> None:
        if self._whole is not None:
            self.screen.update(self._whole, **changes)

    def _remove(self, number: int) -> str:
        """Take a trial's bar away and return its point, empty if it has none."""
        running = self._running.pop(number, None)
        if running is None:
            return ""
        self.screen.remove(running.bar)
        return running.point


class _Running(NamedTuple):
    """What is shown of a trial at work."""

    bar: int
    point: str


class _Best(NamedTuple):
    """The best trial so far."""

    losses: list[float]
    number: int
    outcome: Outcome


def describe_metrics(row: dict[str, Any]) -> str:
    """Return ``"val_error 0.12  test_error 0.31"``: errors, else losses, else what there is."""
    parts = []
    for split in _SHOWN:
        measured = [k for k in row if k.startswith(f"{split}_") and k != "val_test_gap"]
        usual = [f"{split}_{kind}" for kind in ("error", "loss")]
        name = next((k for k in (*usual, *measured) if k in row), None)
        if name is not None and row[name] is not None:
            parts.append(f"{name} {row[name]:.4g}")
    return "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
