"""One inner run by itself, with the same tables, checkpoints and resumption as a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ift_tune.base.errors import Interrupted
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.runner import run_trial
from ift_tune.trial.session import Session
from ift_tune.trial.trial import ProblemFactory, Trial


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
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
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
        resume: Go on with the run in `out`; a finished one is left as it is.
        callbacks: Hooks into the run.

    Returns:
        How it ended.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False.
        UsageError: If `resume` is asked for with other settings.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
    """
    config = MetaConfig() if config is None else config
    plan = TrialPlan(problem_factory, budget, config, seed, device, metric, callbacks)
    trial = plan.trial()
    session = Session(out, {"task": task, "backend": "single", **plan.settings()}, resume=resume)
    record = session.run.trial(0)
    if resume and (finished := _finished(record, trial)) is not None:
        return finished
    with session.writing(dry_check=trial.setup):
        outcome = run_trial(
            trial,
            0,
            record=record,
            facts={"run_id": session.run_id, "task": task, "arm": "ift", "trial": 0},
            callbacks=callbacks,
            interrupt=session.interrupt,
        )
    if outcome.stop_reason is StopReason.INTERRUPTED:
        raise Interrupted("interrupted and saved")
    return outcome


def _finished(record: TrialRecord, trial: Trial) -> Outcome | None:
    """Return how a recorded trial ended, None if there is something left to do."""
    facts = record.facts()
    reason = facts.get("stop_reason")
    if reason is None or StopReason(reason) in (StopReason.INTERRUPTED, StopReason.FAILED):
        return None
    rows = record.steps().ffill().to_dict("records")
    last = {str(k): v for k, v in rows[-1].items() if v == v} if rows else {}  # without NaN
    trial.metrics = last | {k: v for k, v in facts.items() if v is not None}
    return Outcome(StopReason(reason), trial.value, trial.metric, trial.metrics)
