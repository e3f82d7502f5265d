"""The run behind a fit: its folder, its trials, its tables and its model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from ift_tune.base.arguments import require_path
from ift_tune.base.errors import IFTTuneError, Interrupted, UsageError, require
from ift_tune.base.files import fleeting
from ift_tune.base.status import Outcome, StopReason
from ift_tune.hyper import ExampleWeights, HyperKind, kinds_in
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.space import Choice, Distribution, Float, MetaSpace
from ift_tune.sklearn.recipe import Recipe
from ift_tune.trial.best import find_best, load_best
from ift_tune.trial.diagnoses import DIAGNOSES, of_nothing_learned
from ift_tune.trial.refit import refit
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import load_results

METRIC = "search_loss"  # errors of few rows have ties


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        config: The meta-hyperparameters; with a search, what does not vary.
        budget: Length of each trial.
        n_trials: Of a search; None for one trial.
        space: Of a search; None for `default_space`.
        refit: Whether to train the final model from scratch, on the validation rows too.
        seed: Of the run.
        device: Where.
        verbose: Whether to print a line for each outer step.
    """

    config: MetaConfig
    budget: Budget
    n_trials: int | None
    space: MetaSpace | None
    refit: bool
    seed: int
    device: str
    verbose: bool


@dataclass(frozen=True)
class Found:
    """What a run has found.

    Attributes:
        model: The trained model, in evaluation mode.
        hyper: λ.
        trials: The table, a row a trial.
        steps: The table, a row an outer step.
    """

    model: nn.Module
    hyper: HyperKind
    trials: pd.DataFrame
    steps: pd.DataFrame


class Home:
    """The folder of a run: one of the user's, which stays, or a temporary one that goes.

    Attributes:
        path: It.
    """

    def __init__(self, parent: str | Path | None) -> None:
        """Make it: ``fit-0``, ``fit-1``, ... in a directory of the user's, since clones share it.

        Args:
            parent: The user's; None for a temporary folder.
        """
        self.kept = parent is not None
        if parent is None:
            made = Path(tempfile.mkdtemp(prefix="ift_tune-"))
            self._gone = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
            self.path = made / "run"
            return
        folder = require_path("run_dir", parent)
        self._new_parent = not folder.exists()
        number = 0
        while True:
            self.path = folder / f"fit-{number}"
            try:
                self.path.mkdir(parents=True)  # several processes may fit at once
            except FileExistsError:
                number += 1
            except OSError as error:
                raise UsageError(
                    f"run_dir must be a directory that you may write to, got {folder} "
                    f"({error.strerror})"
                ) from error
            else:
                return

    def writing(self) -> AbstractContextManager[None]:
        """Return what files are written in: a temporary folder's need not survive a power cut."""
        return contextlib.nullcontext() if self.kept else fleeting()

    def leave(self) -> None:
        """Remove a temporary folder; one of the user's stays, unless nothing has come into it."""
        if not self.kept:
            self._gone()
            return
        with contextlib.suppress(OSError):
            self.path.rmdir()  # which refuses what is not empty
            if self._new_parent:
                self.path.parent.rmdir()


def train(recipe: Recipe, plan: Plan, home: Home) -> Found:
    """Run the trials of a fit.

    Raises:
        IFTTuneError: If no trial has come to a model.
        KeyboardInterrupt: On Ctrl-C.
    """
    callbacks: list[Callback] = [_Lines()] if plan.verbose else []
    try:
        if plan.n_trials is None:
            _one_trial(recipe, plan, home, callbacks)
        else:
            _search(recipe, plan, home, callbacks)
        problem = load_best(home.path, recipe, device=plan.device)
        model: nn.Module = problem.model
        if plan.refit:
            model = refit(
                home.path, recipe, "train+val", device=plan.device, callbacks=callbacks
            ).model
    except Interrupted as error:
        raise KeyboardInterrupt from error
    trials, steps = (_without_test(table) for table in load_results(home.path))
    _say_what_was_not_learned(trials, int(find_best(home.path)["trial"]))
    return Found(model, cast(HyperKind, problem.hyper), trials, steps)


def _say_what_was_not_learned(trials: pd.DataFrame, best: int) -> None:
    """Warn if the hyperparameters of the model are those that it began with."""
    entry = trials.loc[trials["trial"] == best, DIAGNOSES].iloc[0]
    if sentences := of_nothing_learned(entry):
        warnings.warn(
            "no hyperparameter was learned, they are about what they began as: "
            + "; ".join(sentences),
            ConvergenceWarning,
            stacklevel=4,
        )


def _one_trial(recipe: Recipe, plan: Plan, home: Home, callbacks: list[Callback]) -> None:
    outcome = run_single(
        recipe,
        plan.budget,
        out=home.path,
        task="fit",
        config=plan.config,
        seed=plan.seed,
        device=plan.device,
        metric=METRIC,
        callbacks=callbacks,
    )
    if outcome.stop_reason is StopReason.DONE:
        return
    mend = f"lower learning_rate or meta_lr, got learning_rate={plan.config.inner_lr:g}"
    if not (home.path / "best" / "model.pt").exists():
        raise IFTTuneError(f"the training ended {outcome.stop_reason.value}: {mend}")
    warnings.warn(
        f"the training ended {outcome.stop_reason.value} after its best step, which is kept: "
        f"{mend}",
        ConvergenceWarning,
        stacklevel=5,
    )


def default_space(config: MetaConfig) -> MetaSpace:
    """Return what a search varies: the package's space, and the learning rate of the weights.

    Its ranges are as wide as to hold the settings that were given.
    """
    flat, rate = config.to_flat(), config.inner_lr
    ranges = MetaSpace.default().distributions
    varied = {name: _holding(d, flat.get(name)) for name, d in ranges.items()}
    return MetaSpace({**varied, "inner_lr": Float(rate / 10, rate * 10, log=True)})


def _holding(d: Distribution, value: Any) -> Distribution:
    """Return a range that holds a value, if it is a number that a range of its form may hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(d, Choice) or not number or (d.log and value <= 0):
        return d
    return replace(d, low=min(d.low, value), high=max(d.high, value))


def _search(recipe: Recipe, plan: Plan, home: Home, callbacks: list[Callback]) -> None:
    """Search, beginning with the estimator's own settings."""
    study = require("ift_tune.search.study", extra="optuna", what="search")
    space = plan.space or default_space(plan.config)
    flat = plan.config.to_flat()
    # What a space of the user's own does not hold is left to the sampler.
    varied = space.distributions.items()
    own = {key: flat[key] for key, d in varied if key in flat and d.holds(flat[key])}
    with _quiet_optuna():
        result = study.run_study(
            recipe,
            space,
            plan.budget,
            n_trials=plan.n_trials,
            out=home.path,
            task="fit",
            config=plan.config,
            seed=plan.seed,
            device=plan.device,
            metric=METRIC,
            callbacks=callbacks,
            enqueue=[own] if own else [],
        )
    if result.best is None:
        raise IFTTuneError(
            f"no trial of the search has come to a model: lower learning_rate; {result.failure}"
        )


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    quiet = require("ift_tune.search.outcomes", extra="optuna", what="search").optuna_quiet
    with quiet():
        yield


def _without_test(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without what is said of the test split: an estimator has none."""
    told = [name for name in table.columns if "test" in name.split("_")]
    return table.drop(columns=told)


def weighs_examples(hyper: HyperKind) -> bool:
    """Return whether there is a weight for each training example, as an audit needs."""
    return bool(kinds_in(hyper, ExampleWeights))


class _Lines(Callback):
    """Prints a line for each outer step and each trial."""

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        told = ", ".join(
            f"{split} {row[name]:.4g}"
            for split in ("train", "val", "search")
            if (name := f"{split}_loss") in row
        )
        print(f"[ift_tune] trial {number}, step {row['step']}: {told}", flush=True)

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        value = "" if outcome.value is None else f", {outcome.metric} {outcome.value:.4g}"
        print(f"[ift_tune] trial {number} ended {outcome.stop_reason.value}{value}", flush=True)
