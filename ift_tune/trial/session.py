"""One session of a run, whatever runs the trials: refused or resumed, locked; and a single run."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ift_tune.base.arguments import require_flag, require_text
from ift_tune.base.checkpoints import load_checkpoint
from ift_tune.base.environment import environment
from ift_tune.base.errors import (
    EnvironmentFaultError,
    Interrupted,
    MissingDependencyError,
    UsageError,
)
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.once import saying_once
from ift_tune.base.status import Outcome, SolveStatus, StopReason
from ift_tune.base.trust import is_signed_folder, sign_folder
from ift_tune.joint.callbacks import Callback, RunFacts, during
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.trial.best import keep_best, left_in
from ift_tune.trial.plan import TrialPlan, check_problem
from ift_tune.trial.record import TrialRecord, latest
from ift_tune.trial.refit import train_baseline
from ift_tune.trial.runner import run_trial
from ift_tune.trial.tables import Results, RunDirectory
from ift_tune.trial.trial import ProblemFactory, Trial

_log = logging.getLogger(__name__)


class Session:
    """What a single run, a study, a search with Ray and a comparison have around their trials.

    Made, it has refused what cannot be done and has written nothing. In `writing`, it holds the
    directory and listens for Ctrl-C; at the end it writes the tables.

    Attributes:
        run: The run directory.
        run_id: The run's id, in `writing`.
        extent: What the run shall hold in the end, of earlier sessions and of this one.
        interrupt: What Ctrl-C has asked for, in `writing`.
        trusted: Whether the directory is this user's, or the user says so, in `writing`.
        tables: Both tables, after `writing`.
    """

    run_id: str
    interrupt: Interrupt
    trusted: bool
    tables: Results

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        place: Mapping[str, Any] | None = None,
        extent: Mapping[str, Sequence[Any]] | None = None,
        formerly: Mapping[str, Any] | None = None,
        trust: bool | None = None,
    ) -> None:
        """Compare what is asked for with what the directory holds; see `RunDirectory.begin`.

        Args:
            out: The run directory.
            settings: Everything that decides the numbers.
            resume: Whether to go on with the run in `out`.
            place: Further settings that must not change.
            extent: Lists that may grow.
            formerly: How earlier versions wrote some of `place`.
            trust: Whether to sign a directory whoever wrote it; False: only a new one; None: none,
                where nothing that runs is kept.

        Raises:
            RunExistsError: If `out` is not empty and `resume` is False.
            UsageError: If it holds a run with other settings.
        """
        self.run = RunDirectory(out, resume=resume)
        self._settings, self._place, self._extent = settings, place, extent
        self._formerly = formerly or {}
        self._trust = trust
        self.run.check({**settings, **(place or {})}, self._formerly)
        self.extent = self.run.extended(extent or {})

    @contextlib.contextmanager
    def writing(
        self,
        dry_check: Callable[[], object] | None = None,
        listening: Callable[[], AbstractContextManager[Interrupt]] | None = None,
    ) -> Iterator[None]:
        """Hold the directory while trials run, and write the tables afterwards.

        A call that turns out to be mistaken before its first trial leaves nothing behind, so that
        the corrected one is not refused.

        Args:
            dry_check: Finds mistakes before anything is written, missing data among them.
            listening: Listens for the user's wish to stop. Default: for Ctrl-C and SIGTERM.

        Raises:
            RunExistsError: If another process is at the run.
        """
        with saying_once():
            if dry_check is not None:
                dry_check()
            yield from self._held(listening)

    def _held(
        self, listening: Callable[[], AbstractContextManager[Interrupt]] | None
    ) -> Iterator[None]:
        missing = [p for p in (self.run.path, *self.run.path.parents) if not p.exists()]
        with self.run.held(), self._leaving_nothing_if_refused(missing):
            new = self.run.is_empty()
            # Another session may have ended since this one was made.
            self.extent = self.run.extended(self._extent or {})
            self.run_id = self.run.begin(
                self._settings,
                environment(),
                self._place,
                None if self._extent is None else self.extent,
                self._formerly,
            )
            self.trusted = self._is_ours(new)
            with (listening or Interrupt().listening)() as self.interrupt:
                try:
                    yield
                except EnvironmentFaultError:
                    with contextlib.suppress(EnvironmentFaultError):  # it is likely to go on
                        self.run.write_tables()
                    raise
                except BaseException:
                    self.run.write_tables()
                    raise
                self.tables = self.run.write_tables()

    def _is_ours(self, new: bool) -> bool:
        """Return whether this user wrote the directory, and sign it if that is known."""
        if self._trust is None or is_signed_folder(self.run.path):
            return True
        if new or self._trust:
            sign_folder(self.run.path)
        return new or self._trust

    @contextlib.contextmanager
    def _leaving_nothing_if_refused(self, missing: Sequence[Path]) -> Iterator[None]:
        fresh = self.run.is_empty()
        try:
            yield
        except (UsageError, MissingDependencyError):
            if fresh and not self.run.records():
                shutil.rmtree(self.run.path, ignore_errors=True)
                with contextlib.suppress(OSError):  # somebody may have put something there
                    for folder in missing[1:]:
                        folder.rmdir()
                if not missing:
                    self.run.path.mkdir()
            raise


def run_single(
    problem_factory: ProblemFactory,
    budget: Budget,
    *,
    out: str | Path,
    task: str = "custom",
    config: MetaConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    metric: str | None = None,
    mode: str | None = None,
    resume: bool = False,
    baseline: bool = False,
    callbacks: Sequence[Callback] = (),
    processes_per_trial: int = 1,
) -> Outcome:
    """Run one trial with fixed meta-hyperparameters into a run directory.

    Args:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        budget: Length of the run.
        out: Run directory; refused if it holds anything, unless `resume`.
        task: Name in the tables.
        config: The meta-hyperparameters. Default: ``MetaConfig()``.
        seed: Of the problem and the run.
        device: Where it runs.
        metric: The search metric; see `Trial`.
        mode: ``"min"`` or ``"max"``; see `Trial`.
        resume: Go on with the run in `out`. One that has come to its end goes on if the budget is
            larger now, as if it had been so from the start: an evaluation that the earlier end
            alone has asked for is taken back. Else it is left as it is.
        baseline: Whether to train plainly as well, with λ as the factory sets it: what that scores
            are the columns ``baseline_...`` of the tables.
        callbacks: Hooks into the run.
        processes_per_trial: How many processes share the run: each computes on its share of the
            examples of every batch, on a GPU of its own or on its share of the cores. The numbers
            are those of one process, to rounding, and a run may go on with another number of them;
            docs/cluster.md says which problems can be shared. A script that asks for several needs
            ``if __name__ == "__main__":``.

    Returns:
        How it ended.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False.
        UsageError: If `resume` is asked for with other settings.
        Interrupted: On Ctrl-C or SIGTERM, after saving.

    Example:
        >>> from ift_tune import Budget, load_best, run_single, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> outcome = run_single(problem, Budget(outer_steps=5), out="runs/mine", device="cpu")
        >>> outcome.stop_reason.value, outcome.metric
        ('done', 'search_loss')
        >>> best = load_best("runs/mine", problem)
        >>> abs(best.measure("search")["loss"] - outcome.value) < 1e-12
        True
    """
    require_text("task", task)
    require_flag("resume", resume)
    require_flag("baseline", baseline)
    config = MetaConfig() if config is None else config
    plan = TrialPlan(
        problem_factory,
        budget,
        config,
        seed,
        device,
        metric,
        mode,
        callbacks,
        processes=processes_per_trial,
    )
    trial = plan.trial()
    begun = _begun_with(RunDirectory(out, resume=resume), plan)
    session = Session(
        out,
        {"task": task, "backend": "single", **plan.settings(), "budget": begun},
        resume=resume,
    )
    run, record = session.run, session.run.trial(0)
    outcome = _finished(record, trial) if resume else None

    def dry_check() -> None:
        trial.setup()
        check_problem(trial.joint.problem, metric, trial.config)

    # What a finished trial leaves behind is made up for, if a kill came between.
    finished = int(outcome is not None)
    facts = RunFacts(run.path, task, budget, plan.objectives, total=1, finished=finished)
    with session.writing(None if outcome is not None else dry_check), during(callbacks, facts):
        if outcome is None:
            outcome = run_trial(
                trial,
                0,
                record=record,
                facts={"run_id": session.run_id, "task": task, "arm": "ift", "trial": 0},
                callbacks=callbacks,
                interrupt=session.interrupt,
                goes_on=True,
            )
        keep_best(run, 0)
        if baseline and outcome.stop_reason is StopReason.DONE:
            train_baseline(
                run,
                problem_factory,
                trial.device,
                callbacks,
                session.interrupt,
                processes=processes_per_trial,
            )
    outcome.metrics.update(run.baseline())
    if outcome.stop_reason is StopReason.INTERRUPTED:
        raise Interrupted("interrupted and saved: go on by the same call with resume=True")
    if outcome.stop_reason in (StopReason.NONFINITE, StopReason.DIVERGED):
        # The words of both are also those of a solve.
        why = (outcome.fault or SolveStatus(outcome.stop_reason.value).advice).rstrip(".")
        _log.warning("the run ended %s. %s%s", outcome.stop_reason.value, why, left_in(run.path))
    return replace(outcome, run=run.path)


def _begun_with(run: RunDirectory, plan: TrialPlan) -> dict[str, Any]:
    """Return the budget that a run was begun with if it can go on with this one, else this one.

    Raises:
        UsageError: If it could, but for a checkpoint, or for learning rates that have followed a
            schedule to the end of the earlier budget.
    """
    now, begun = plan.budget, run.settings().get("budget")
    if begun is None or now.to_plain() == begun or not now.covers(Budget(**begun)):
        return now.to_plain()
    record = run.trial(0)
    if record.facts().get("stop_reason") == StopReason.DONE and not record.checkpoint.exists():
        raise UsageError(
            f"the run in {run.path} has no {record.checkpoint.name} of its last step to go on "
            f"from: begin a new run in another directory, got {now} beside {begun}"
        )
    if plan.config.inner_schedule != "constant":
        raise UsageError(
            f"the run in {run.path} cannot go on to a larger budget, whose learning rates would "
            "have been others from the start: begin a new run in another directory, got "
            f"inner_schedule={plan.config.inner_schedule!r}"
        )
    return dict(begun)


def _finished(record: TrialRecord, trial: Trial) -> Outcome | None:
    """Return how a recorded trial ended, None if there is something left to do."""
    facts, _ = record.whole()
    reason = facts.get("stop_reason")
    if reason is None or not StopReason(reason).is_final:
        return None
    if reason == StopReason.DONE and record.checkpoint.exists():
        ended_with = load_checkpoint(record.checkpoint).get("budget")
        if ended_with != trial.budget.to_plain():
            return None
    # What is missing of the best evaluation is not made up for by the last one.
    known = {**{str(k): v for k, v in latest(record.steps()).items()}, **facts}
    trial.metrics = {k: v for k, v in known.items() if v is not None and v == v}  # without NaN
    value = trial.metrics.get("best_value", trial.metrics.get(trial.metric))
    return Outcome(StopReason(reason), value, trial.metric, trial.metrics, trial.direction.value)
