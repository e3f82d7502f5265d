"""The trainings that an audit rests on: each begun once, interrupted and gone on with, kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ift_tune.base.checkpoints import drop_generations, fingerprint, load_checkpoint
from ift_tune.base.direction import Direction
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import EnvironmentFaultError, IFTTuneError, Interrupted
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.status import StopReason
from ift_tune.joint.budget import Budget
from ift_tune.joint.config import MetaConfig
from ift_tune.problem.batches import Loader
from ift_tune.problem.factory import build_problem
from ift_tune.problem.loaders import first_batch
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size
from ift_tune.studies.audited_problems import LeftOut, OnValidation, Reseeded
from ift_tune.trial.best import find_best
from ift_tune.trial.record import HYPERPARAMETERS, MODEL, TrialRecord
from ift_tune.trial.refit import frozen_trial, refit, refit_folder
from ift_tune.trial.runner import run_trial
from ift_tune.trial.tables import BASELINE, RunDirectory
from ift_tune.trial.trial import ProblemFactory, Trial


class Trained(NamedTuple):
    """A training that is over.

    Attributes:
        kept: Its best evaluation by the search split; see `Trial.kept`.
        cost: In gradient-equivalents.
    """

    kept: dict[str, Any]
    cost: float


class Trainings:
    """The further trainings of an audit, in folders of their own."""

    def __init__(
        self,
        run: RunDirectory,
        factory: ProblemFactory,
        folder: Path,
        device: str | torch.device,
        interrupt: Interrupt,
        say: Callable[[str], None],
    ) -> None:
        """Take the run, whose best trial is `kept`, and where to train.

        Args:
            run: Its directory.
            factory: Makes its problem.
            folder: Holds a folder for each training.
            device: Where.
            interrupt: Looked at between evaluations.
            say: Is told what is trained.
        """
        self.kept = find_best(run.path)
        self._run, self._factory, self._folder, self._device = run, factory, folder, device
        self._interrupt, self._say = interrupt, say

    def fresh(self, kept: Mapping[str, Any] | None = None) -> BilevelProblem:
        """Return the problem as its factory makes it for a run, the audited one by default."""
        kept = self.kept if kept is None else kept
        config = MetaConfig.from_flat(kept["config"])
        return build_problem(self.reseeded, config, resolve_device(self._device), kept["seed"])

    def better_trials(self) -> list[dict[str, Any]]:
        """Return λ of the better half of a search's complete trials, two at least; of one, none.

        They differ in their settings, some of which do not work: the worse half would say so.
        """
        sign = Direction(self.kept["mode"]).sign
        found = []
        for record in self._run.records():
            facts, path = record.facts(), record.path / HYPERPARAMETERS
            value = facts.get("best_value")
            if facts.get("stop_reason") == StopReason.DONE and value is not None and path.exists():
                found.append((sign * float(value), record.number, path))
        better = sorted(found)[: max(2, math.ceil(len(found) / 2))]
        return [load_checkpoint(path) for _, _, path in better] if len(found) > 1 else []

    def other_seed(self, seed: int) -> Trained:
        """Return a joint run of the same examples with another seed."""
        config = MetaConfig.from_flat(self.kept["config"])
        noted = self._run.settings().get("budget")
        steps = math.ceil(self.kept["inner_steps"] / config.inner_steps)
        budget = Budget(outer_steps=steps) if noted is None else Budget(**noted)
        trial = Trial(
            self.reseeded,
            config,
            replace(budget, retrain=False),
            seed=seed,
            device=self._device,
            metric=self.kept["metric"],
            mode=self.kept["mode"],
        )
        facts = {"training": "joint", "budget": budget.to_plain(), **self._facts(seed)}
        return self._trained(trial, f"seed-{seed}", facts, f"a run of seed {seed}")

    def of_seeds(self, seeds: int) -> Iterator[Trained]:
        """Yield the audited run, its whole search charged, and runs of so many seeds in all."""
        costs = [r.facts().get("gradient_equivalents") for r in self._run.records()]
        yield Trained(self.kept, float(sum(cost for cost in costs if cost is not None)))
        for seed in range(self.kept["seed"] + 1, self.kept["seed"] + seeds):
            yield self.other_seed(seed)

    def refitted(self, found: Trained, data: str) -> Trained:
        """Return a training from scratch with the λ that a run has found.

        Args:
            found: The run.
            data: ``"train"`` or ``"train+val"``, see `refit`, which it is of the audited run.
        """
        seed, words = int(found.kept["seed"]), f"on {data}, with the weights frozen"
        if found.kept is self.kept:
            return self._own_refit(data, words)
        trial = frozen_trial(
            found.kept,
            self.reseeded,
            hyper=found.kept["hyper"],
            train_on_val=data != "train",
            device=self._device,
        )
        facts = {"training": data, "hyper": _hash(found.kept["hyper"]), **self._facts(seed)}
        name = self._named(f"refit-{data}", found)
        return self._trained(trial, name, facts, f"{words}{self._of_seed(found)}")

    def _own_refit(self, data: str, words: str) -> Trained:
        record = TrialRecord(self._run.path / refit_folder(data))
        if not record.facts():
            self._say(f"training {words}")
        try:
            refit(self._run.path, self._factory, data, device=self._device)
        except EnvironmentFaultError:
            raise
        except Interrupted as error:
            raise _interrupted() from error
        return Trained(find_best(record.path), float(record.facts()["gradient_equivalents"]))

    def on_validation(self, found: Trained) -> Trained:
        """Return a plain training on the validation split alone, with a run's settings and seed."""
        facts = {"training": "val", **self._facts(found.kept["seed"])}
        trained = self._trained(
            self._plain(OnValidation(self.reseeded), found.kept),
            self._named("on-val", found),
            facts,
            f"on the validation examples{self._of_seed(found)}",
        )
        # Of validation batches, whose size is another than that of the unit.
        problem = self.fresh()
        loaders = problem.splits.train, problem.splits.val
        unit, size = (_first_size(problem, loader) for loader in loaders)
        return Trained(trained.kept, trained.cost * size / unit)

    def plain(self, found: Trained) -> Trained:
        """Return one likewise, λ as the factory sets it: that beside the run, if there is."""
        if found.kept is self.kept and (beside := self._beside()) is not None:
            return beside
        facts = {"training": "plain", **self._facts(found.kept["seed"])}
        trial = self._plain(self.reseeded, found.kept)
        words = f"plainly{self._of_seed(found)}"
        return self._trained(trial, self._named("plain", found), facts, words)

    def left_out(self, part: int, parts: int) -> Trained:
        """Return a plain training without a part of the training examples."""
        facts = {"training": f"without {part} of {parts}", **self._facts(self.kept["seed"])}
        trial = self._plain(LeftOut(self._factory, part, parts), self.kept)
        words = f"without part {part + 1} of {parts}"
        return self._trained(trial, f"without-{part}-of-{parts}", facts, words)

    @property
    def reseeded(self) -> Reseeded:
        """The factory of the runs of other seeds."""
        return Reseeded(self._factory, self.kept["seed"])

    def _beside(self) -> Trained | None:
        """Return the plain training beside the run, if it is of the best trial and ended."""
        record = TrialRecord(self._run.path / BASELINE)
        known = record.facts()
        ended = known.get("trial"), known.get("stop_reason")
        if ended != (self.kept["trial"], StopReason.DONE) or not (record.path / MODEL).exists():
            return None
        return Trained(find_best(record.path), float(known["gradient_equivalents"]))

    def _plain(self, factory: ProblemFactory, kept: Mapping[str, Any]) -> Trial:
        return frozen_trial(kept, factory, hyper=None, train_on_val=False, device=self._device)

    def _named(self, name: str, found: Trained) -> str:
        return name if found.kept is self.kept else f"seed-{found.kept['seed']}-{name}"

    def _of_seed(self, found: Trained) -> str:
        return "" if found.kept is self.kept else f", seed {found.kept['seed']}"

    def _facts(self, seed: int) -> dict[str, Any]:
        return {
            "trial": self.kept["trial"],
            "seed": seed,
            "data_seed": self.kept["seed"],
            "training_steps": self.kept["inner_steps"],
            "settings": _hash(self.kept["hyper"]),
        }

    def _trained(self, trial: Trial, name: str, facts: Mapping[str, Any], words: str) -> Trained:
        """Train into a folder, unless that has been done."""
        record = TrialRecord(self._folder / name)
        known = record.facts()
        if {key: known.get(key) for key in facts} != dict(facts):
            drop_generations(record.checkpoint)
            known = {}
        if known.get("stop_reason") != StopReason.DONE or not (record.path / MODEL).exists():
            self._say(f"training {words}")
            outcome = run_trial(
                trial, facts["trial"], record=record, facts=dict(facts), interrupt=self._interrupt
            )
            if outcome.stop_reason is StopReason.INTERRUPTED:
                raise _interrupted()
            if outcome.stop_reason is not StopReason.DONE:
                raise IFTTuneError(
                    f"a training ended {outcome.stop_reason.value}, without which there is no "
                    f"audit: see {record.path}"
                )
            known = record.facts()
        return Trained(find_best(record.path), float(known["gradient_equivalents"]))


def _interrupted() -> Interrupted:
    return Interrupted("interrupted and saved: audit again to go on")


def _first_size(problem: BilevelProblem, loader: Loader) -> float:
    return float(as_size(problem.batch_size(first_batch("first", loader))))


def _hash(state: Mapping[str, Any]) -> str:
    return fingerprint(v for v in state.values() if isinstance(v, torch.Tensor))
