"""The final model: plain training with λ frozen as a run has found it, on all data there is."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ift_tune.base.checkpoints import drop_generations, fingerprint
from ift_tune.base.errors import IFTTuneError, Interrupted, UsageError, require_number
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.joint.config import MetaConfig
from ift_tune.problem.factory import build_problem, require_factory
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.best import BEST, fill, find_best, load_best, nothing_kept
from ift_tune.trial.record import MODEL, TrialRecord, drop_found
from ift_tune.trial.runner import run_trial
from ift_tune.trial.tables import BASELINE, RunDirectory
from ift_tune.trial.training import BaselineTraining
from ift_tune.trial.trial import ProblemFactory, Trial

_log = logging.getLogger(__name__)

DATA = ("train", "train+val")
"""What a final model may be trained on."""


def refit_folder(data: str, *, val_weight: float = 1.0, penalty_weight: float = 1.0) -> str:
    """Return the name of the folder of a refit, in the run's: of each other weight another."""
    weights = {"val_weight": float(val_weight), "penalty_weight": float(penalty_weight)}
    told = [f"-{name}-{value:g}" for name, value in weights.items() if value != 1.0]
    return f"refit-{data}{''.join(told)}"


def refit(
    run_dir: str | os.PathLike[str],
    make_problem: ProblemFactory,
    data: str = "train",
    *,
    val_weight: float = 1.0,
    penalty_weight: float = 1.0,
    device: str | torch.device = "auto",
    callbacks: Sequence[Callback] = (),
) -> BilevelProblem:
    """Train the final model of a run from scratch, λ frozen as found, and keep it.

    The weights of a run itself have followed λ's whole path; these have only the λ that came out.
    On ``"train+val"`` the m validation examples, from which λ was learned, are trained on as well,
    with the weight c beside the n training examples as λ weighs them: what is minimised is
    (n·(`train_loss` + a·penalty) + c·m·`val_loss`) / (n + c·m). So with a = 1 decays keep the
    strength against the sum of the training losses that they were learned with.
    The search split still says which evaluation of the training counts (early stopping), so the
    test split stays what nothing has been chosen by. Trained are at most as many inner steps as the
    best trial took, up to whole intervals between evaluations, with its meta-hyperparameters.

    It lies in ``refit-<data>/`` of the run directory, with its steps; weights other than 1 have a
    folder of their own, ``refit-train+val-val_weight-2/``. One that was interrupted goes on, one
    that is there already is loaded.
    Validation examples are trained on by `val_loss`, in which no hyperparameter acts on data or
    predictions: a learned augmentation or dropout is at work on the training examples alone.

    Args:
        run_dir: The run directory.
        make_problem: The factory that the run was made with.
        data: ``"train"``, or ``"train+val"``.
        val_weight: c, with ``"train+val"``.
        penalty_weight: a likewise. Decays that were learned beside weights far from their minimum
            are often too weak by several times.
        device: Where.
        callbacks: Their hooks of the search are called: it has no outer steps.

    Returns:
        The problem with the trained model, in evaluation mode, and λ.

    Raises:
        UsageError: If the run has kept no model, or an argument is wrong.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        IFTTuneError: If the training has not come to its end.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, refit, run_study, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> budget = Budget(outer_steps=3)
        >>> result = run_study(problem, space, budget, n_trials=2, out="runs/mine", device="cpu")
        >>> final = refit("runs/mine", problem, data="train+val", device="cpu")
        >>> final.measure("test")["loss"] < 100.0
        True
    """
    if data not in DATA:
        raise UsageError(f"data must be 'train' or 'train+val', got {data!r}")
    asked = {"val_weight": val_weight, "penalty_weight": penalty_weight}
    for name, value in asked.items():
        require_number(name, value, above=0.0)
        if data == "train" and value != 1.0:
            raise UsageError(f"{name} goes with data='train+val', got {value!r} with 'train'")
    require_factory(make_problem)
    run = RunDirectory(run_dir, resume=True)
    if not (run.path / BEST / MODEL).exists():
        raise nothing_kept(run.path)
    kept = find_best(run.path)
    record = TrialRecord(run.path / refit_folder(data, **asked))
    facts = {
        "trial": kept["trial"],
        "refit_data": data,
        "training_steps": kept["inner_steps"],
        "hyper": fingerprint(v for v in kept["hyper"].values() if isinstance(v, torch.Tensor)),
    }
    if data != "train":  # earlier versions noted neither, and left the penalty as it was
        facts |= {name: float(value) for name, value in asked.items()}
    ended = _final_end(record, facts)
    if ended is None:
        trial = frozen_trial(
            kept,
            make_problem,
            hyper=kept["hyper"],
            train_on_val=data != "train",
            val_weight=val_weight,
            penalty_weight=penalty_weight,
            device=device,
        )
        with run.held(), Interrupt().listening() as interrupt:
            ended = _train(trial, record, facts, callbacks, interrupt).stop_reason
    if ended is StopReason.INTERRUPTED:
        raise Interrupted("interrupted and saved: refit again to go on")
    if ended is not StopReason.DONE:
        mend = "delete that folder" if ended.is_final else "make room and refit again"
        raise IFTTuneError(f"the training ended {ended.value}: see {record.path}; {mend}")
    return load_best(record.path, make_problem, device=device)


def train_baseline(
    run: RunDirectory,
    make_problem: ProblemFactory,
    device: str | torch.device,
    callbacks: Sequence[Callback],
    interrupt: Interrupt,
    *,
    processes: int = 1,
) -> None:
    """Train plainly beside a run: with the best trial's settings, and λ as the factory sets it.

    So a run says what its λ has gained. Nothing happens without a best trial, or where this has
    been done for it already.

    Args:
        run: The run directory, held by the caller.
        make_problem: The factory that the run was made with.
        device: Where.
        callbacks: Their hooks of the search are called.
        interrupt: Looked at between evaluations.
        processes: How many share the training.

    Raises:
        Interrupted: If the user asked to stop, after saving.
    """
    if not (run.path / BEST / MODEL).exists():
        return
    kept = find_best(run.path)
    record = TrialRecord(run.path / BASELINE)
    facts = {"trial": kept["trial"], "arm": "none", "training_steps": kept["inner_steps"]}
    if _final_end(record, facts) is not None:
        return
    trial = frozen_trial(
        kept, make_problem, hyper=None, train_on_val=False, device=device, processes=processes
    )
    told = [_BaselineSteps(callbacks)]
    if _train(trial, record, facts, told, interrupt).stop_reason is StopReason.INTERRUPTED:
        raise Interrupted(
            "interrupted and saved, in the plain training beside the run: go on by the same call "
            "with resume=True"
        )
    interval = trial.config.inner_steps
    if record.facts().get("best_step") == 1 and interval > kept["config"]["inner_steps"]:
        _log.warning(
            "the plain training beside the run was best at its first evaluation, after %d inner "
            "steps: it may have been better before, and a run of fewer outer steps has a fairer "
            "one beside it",
            interval,
        )


class _BaselineSteps(Callback):
    """Tells callbacks of the steps, which are no trial's."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = CallbackList(callbacks)

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self._callbacks.on_baseline_step(row)


def _are_of(known: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    return {key: known.get(key) for key in facts} == dict(facts)


def _final_end(record: TrialRecord, facts: Mapping[str, Any]) -> StopReason | None:
    """Return how a training ended; None if something is left to do, or it is another one."""
    known = record.facts()
    reason = known.get("stop_reason")
    if reason is None or not _are_of(known, facts):
        return None
    return StopReason(reason) if StopReason(reason).is_final else None


def _train(
    trial: Trial,
    record: TrialRecord,
    facts: Mapping[str, Any],
    callbacks: Sequence[Callback],
    interrupt: Interrupt,
) -> Outcome:
    """Run a plain training into a record of its own; what is there of another one is dropped."""
    if not _are_of(record.facts(), facts):
        drop_generations(record.checkpoint)
        drop_found(record)
    return run_trial(
        trial,
        facts["trial"],
        record=record,
        facts=dict(facts),
        callbacks=callbacks,
        interrupt=interrupt,
    )


def frozen_trial(
    kept: Mapping[str, Any],
    make_problem: ProblemFactory,
    *,
    hyper: Mapping[str, Any] | None,
    train_on_val: bool,
    device: str | torch.device,
    val_weight: float = 1.0,
    penalty_weight: float = 1.0,
    processes: int = 1,
) -> Trial:
    """Return a plain training with the settings of a kept trial, for as many inner steps.

    Args:
        kept: See `Trial.kept`.
        make_problem: The factory.
        hyper: The state of λ; None: as the factory sets it.
        train_on_val: Whether to train on the validation split too, see `refit`.
        device: Where.
        val_weight: Likewise.
        penalty_weight: Likewise.
        processes: How many share the training; several take λ as the factory sets it.
    """

    def with_hyper(config: MetaConfig, where: torch.device, seed: int) -> BilevelProblem:
        problem = build_problem(make_problem, config, where, seed)
        fill(problem.hyper, hyper or {}, "hyper")
        return problem

    config = MetaConfig.from_flat(kept["config"])
    steps = kept["inner_steps"]
    training = (
        BaselineTraining.of_frozen(steps, val_weight=val_weight, penalty_weight=penalty_weight)
        if train_on_val
        else BaselineTraining(steps)
    )
    patience = training.patience(kept["patience"], config.inner_steps)
    return Trial(
        make_problem if hyper is None else with_hyper,
        config,
        replace(training.length, retrain=False, patience=patience),
        seed=kept["seed"],
        device=device,
        metric=kept["metric"],
        mode=kept["mode"],
        training=training,
        processes=processes,
    )
