"""A study with its tables, as `run_study` returns it, and how it shows itself."""

from __future__ import annotations

from typing import NamedTuple

import optuna
import pandas as pd

from ift_tune.base.cards import Card
from ift_tune.search.analysis import best_point, front_of, without_result
from ift_tune.trial.best import BestTrial
from ift_tune.trial.showing import card_of_tables
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory


class _Tables(NamedTuple):
    study: optuna.Study
    trials: pd.DataFrame
    steps: pd.DataFrame


class StudyResult(_Tables):
    """A study with its tables: ``study, trials, steps = result``.

    Shown in a notebook, or printed, it says how its trials ended and which is the best.
    """

    _home: tuple[RunDirectory, ProblemFactory, str] | None = None

    def at(self, run: RunDirectory, factory: ProblemFactory, device: str) -> StudyResult:
        """Return it with where the best model lies, and what it is loaded with."""
        self._home = (run, factory, device)
        return self

    @property
    def best(self) -> BestTrial | None:
        """The best complete trial of the study; None if there is none.

        It keeps all constraints; of several metrics it is the best by the first.
        It is a dictionary of plain values, and its ``model`` and ``hyper`` are the trained model
        and its λ, see `load_best`.
        """
        point = best_point(self.study)
        return None if point is None else BestTrial(point, self._home)

    @property
    def front(self) -> pd.DataFrame:
        """The Pareto front, a row a trial: its number, its metrics and what was searched."""
        return front_of(self.study)

    @property
    def failure(self) -> str | None:
        """Why there is no best trial, in a sentence; None if there is one."""
        return without_result(self.trials) if self.best is None else None

    def __repr__(self) -> str:
        return self._card().text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._card().html()

    def _card(self) -> Card:
        folder = None if self._home is None else self._home[0].path
        return card_of_tables(self.trials, self.steps, folder, self.best, self.failure)
