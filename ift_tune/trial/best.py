"""The best model of a run: kept in ``best/``, and loaded into a problem again."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ift_tune.base.arguments import require_path
from ift_tune.base.checkpoints import load_checkpoint, save_checkpoint, taking_over
from ift_tune.base.direction import Direction
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import UsageError
from ift_tune.base.locks import ProcessLock
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import StopReason
from ift_tune.joint.config import MetaConfig
from ift_tune.problem.factory import build_problem, require_factory
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.record import MODEL, latest, records_in
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory

_CHECKPOINT = "checkpoint.pt"

BEST = "best"
"""Folder of a run directory that holds the model and λ of its best trial."""

_log = logging.getLogger(__name__)

_NEEDED = ("model", "hyper", "config", "seed")  # of what is kept, by whoever loads it


def keep_best(run: RunDirectory, number: int) -> None:
    """Move a finished trial's model to ``best/`` unless that holds a better one; then drop it.

    So a search keeps one model, and that of each trial that is not over yet. What violates a
    constraint is not kept; of several metrics the first decides, and the others between equals.

    Args:
        run: The run directory.
        number: The trial's number; one that has left no model changes nothing.
    """
    source, target = run.trial(number).path / MODEL, run.path / BEST / MODEL
    if not source.exists():
        return
    found = {**load_checkpoint(source), "trial": number}
    objectives = Objectives.of_run(run.settings())
    if objectives.read_at_the_end:
        record = run.trial(number)
        facts, _ = record.whole()
        measured = {**latest(record.steps()), **facts}
        if any(excess > 0.0 for excess in objectives.violations(measured).values()):
            source.unlink()
            return
        found["further_losses"] = objectives.further_losses(measured)
    target.parent.mkdir(exist_ok=True)
    with ProcessLock(target.parent / ".lock"):  # several processes may finish trials at once
        if not target.exists() or _takes_the_place(found, load_checkpoint(target)):
            save_checkpoint(target, found)
        source.unlink()


def _takes_the_place(found: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    """Return whether a trial is better; of equal ones the first is, in whatever order they end."""
    if found["trial"] == of["trial"]:  # it has gone on
        return True
    sign = Direction(found["mode"]).sign
    new, old = (
        (sign * each["best_value"], each.get("further_losses", []), each["trial"])
        for each in (found, of)
    )
    return bool(new < old)


def load_best(
    path: str | os.PathLike[str],
    make_problem: ProblemFactory,
    *,
    device: str | torch.device = "auto",
    at: Literal["best", "last"] = "best",
) -> BilevelProblem:
    """Return the problem with the weights and λ of a run's best evaluation of the search split.

    Args:
        path: A run directory, of `run_study`, `run_ray` or ``ift-tune run`` and ``search``; the
            folder of a refitted model, see `refit`; or a checkpoint of a Ray trial.
        make_problem: The factory that the run was made with. It is given the configuration of the
            best trial and the run's seed.
        device: Where to.
        at: ``"last"``: with those of the last step instead, which a single run keeps in its
            checkpoint. λ may go on to learn when the weights have begun to memorise, as weights of
            examples do.

    Of a run of one trial that has not come to its end, the best is that of its steps so far, and a
    warning says so.

    Returns:
        The problem; its ``model``, in evaluation mode, predicts, its ``hyper`` is λ.

    Raises:
        UsageError: If no model was kept there, or it does not fit what the factory makes.
        CheckpointError: If the file is damaged.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, load_best, run_study, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> budget = Budget(outer_steps=3)
        >>> result = run_study(problem, space, budget, n_trials=2, out="runs/mine", device="cpu")
        >>> best = load_best("runs/mine", problem)
        >>> abs(best.measure("search")["loss"] - result.study.best_value) < 1e-12
        True
    """
    if at not in ("best", "last"):
        raise UsageError(f"at must be 'best' or 'last', got {at!r}")
    kept = _last(path) if at == "last" else _best_so_far(path) or find_best(path)
    return problem_of(kept, make_problem, device)


def _best_so_far(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what the one trial of a run that has not come to its end keeps; None of any other."""
    folder = require_path("the run directory", path)
    records = records_in(folder)
    if (folder / BEST / MODEL).exists() or len(records) != 1 or not records[0].checkpoint.exists():
        return None
    file = records[0].checkpoint
    state = load_checkpoint(file)
    with taking_over(file):
        if state["stop_reason"] is not None or (found := _best_in(state)) is None:
            return None
        _log.warning(
            "%s has not come to its end: this is the best evaluation of its first %d steps",
            records[0].path,
            state["joint"]["outer_steps"],
        )
        return found


def _best_in(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the best evaluation in a trial's checkpoint; None before the first."""
    if "model" not in (best := state.get("best") or {}):
        return None
    return {
        **{key: best[key] for key in ("model", "hyper")},
        "best_value": best["value"],
        "best_step": best["step"],
        "config": state["config"],
        "seed": state["identity"]["seed"],
    }


def _last(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the model and λ of the last step of a single run, or of a checkpoint of Ray's.

    Raises:
        UsageError: If there is no checkpoint of it.
    """
    folder = require_path("the run directory", path)
    for file in (folder / "trial-00000" / _CHECKPOINT, folder / _CHECKPOINT):
        if file.exists():
            state = load_checkpoint(file)
            with taking_over(file):
                joint = state["joint"]
                return {
                    **{key: joint[key] for key in ("model", "hyper")},
                    "config": state["config"],
                    "seed": state["identity"]["seed"],
                }
    raise UsageError(
        f"{folder} has no {_CHECKPOINT} of a last step: a search keeps the best of its trials "
        "alone; run the best trial's settings by run_single (ift-tune run), which keeps both"
    )


def find_best(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what was kept of the best evaluation; see `Trial.kept`.

    Raises:
        UsageError: If nothing was kept there.
        CheckpointError: If the file is damaged.
    """
    folder = require_path("the run directory", path)
    if not folder.exists():
        raise UsageError(f"there is no {folder}: name a run directory, or a folder with {MODEL}")
    for file in (folder / BEST / MODEL, folder / MODEL, folder):
        if file.is_file() or (file.exists() and file != folder):
            kept = load_checkpoint(file)
            with taking_over(file):
                return kept | {key: kept[key] for key in _NEEDED}
    if (checkpoint := folder / _CHECKPOINT).exists():
        state = load_checkpoint(checkpoint)
        with taking_over(checkpoint):
            if (best := _best_in(state)) is not None:
                return best
    raise nothing_kept(folder)


def nothing_kept(folder: Path) -> UsageError:
    """Return what to raise where no model was kept."""
    ended = {r.facts().get("stop_reason") for r in records_in(folder)}
    over = [reason for reason in ended if reason is not None and StopReason(reason).is_final]
    if over and len(over) == len(ended) and StopReason.DONE not in over:
        return UsageError(
            f"{folder} keeps no trained model: no trial has come to a value, see `stop_reason`, "
            f"`solve_status` and `diagnoses` in its tables, got {', '.join(sorted(over))}"
            f"{left_in(folder)}"
        )
    return UsageError(
        f"{folder} keeps no trained model: it has none before its first trial has come to its end, "
        "and runs of earlier versions have none; go on with it by --resume (resume=True), name a "
        "run directory with a finished trial, or the folder of a trial, whose checkpoint has what "
        "it has come to so far (in Python also at='last')"
    )


def left_in(folder: Path) -> str:
    """Return in words where trials that broke off have left the model of their best evaluation.

    It is no result, and is in their checkpoints alone, which a single run keeps.
    """
    for record in records_in(folder):
        if (step := record.facts().get("best_step")) is not None and record.checkpoint.exists():
            call = f"load_best({str(record.path)!r}, make_problem)"
            return f"; the model of its best evaluation, of step {step}, is loaded by {call}"
    return ""


def problem_of(
    kept: Mapping[str, Any], make_problem: ProblemFactory, device: str | torch.device
) -> BilevelProblem:
    """Return the problem that a kept model and λ belong to, holding them.

    Raises:
        UsageError: If they do not fit what the factory makes.
    """
    require_factory(make_problem)
    config = MetaConfig.from_flat(kept["config"])
    problem = build_problem(make_problem, config, resolve_device(device), kept["seed"])
    fill(problem.model, kept["model"], "model")
    fill(problem.hyper, kept["hyper"], "hyper")
    problem.model.eval()
    return problem


def fill(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load what was kept into a module that a factory has made.

    Raises:
        UsageError: If it does not fit.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f"the {what} that was kept does not fit the one that the factory makes: give the "
            f"factory that the run was made with, got {' '.join(str(error).split())}"
        ) from error


class BestTrial(dict[str, Any]):
    """The best trial of a search as plain values; its `model` and `hyper` are loaded when used."""

    def __init__(
        self, values: Mapping[str, Any], home: tuple[RunDirectory, ProblemFactory, str] | None
    ) -> None:
        """Take the values, and where its model lies: the run, its factory and the device."""
        super().__init__(values)
        self._home = home

    @functools.cached_property
    def problem(self) -> BilevelProblem:
        """The problem with the weights and λ of the trial's best evaluation; see `load_best`.

        Raises:
            UsageError: If the model is not in this run directory.
        """
        if self._home is not None:
            run, factory, device = self._home
            if (kept := find_best(run.path))["trial"] == self["trial"]:
                return problem_of(kept, factory, device)
        raise UsageError(
            "the best trial of the study was run into another run directory, which has its model: "
            f"use load_best(run_dir, factory) with that one, got trial {self['trial']}"
        )

    @property
    def model(self) -> nn.Module:
        """The trained model."""
        return self.problem.model

    @property
    def hyper(self) -> nn.Module:
        """The hyperparameters λ that it was trained with."""
        return self.problem.hyper
