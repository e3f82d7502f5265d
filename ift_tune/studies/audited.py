"""The trainings that an audit rests on: each begun once, interrupted and gone on with, kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ift_tune.base.checkpoints import drop_generations, fingerprint, load_checkpoint
from ift_tune.base.direction import Direction
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import IFTTuneError, Interrupted, UsageError
from ift_tune.base.randomness import derive_seed
from ift_tune.base.status import StopReason
from ift_tune.hyper import Compose, ExampleWeights, HyperKind
from ift_tune.hyper.transforms import TRANSFORMS
from ift_tune.implicit.vectors import count
from ift_tune.joint.budget import Budget
from ift_tune.joint.config import MetaConfig
from ift_tune.problem.factory import build_problem
from ift_tune.problem.loaders import reseed
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.best import find_best
from ift_tune.trial.record import HYPERPARAMETERS, MODEL, TrialRecord
from ift_tune.trial.refit import frozen_trial
from ift_tune.trial.runner import Interrupt, run_trial
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


@dataclass(frozen=True)
class Reseeded:
    """The problem of one seed with the initial weights and the order of batches of another.

    A factory's seed may draw the splits too: example 7 of another seed would be another example.

    Attributes:
        factory: Makes the problem.
        data_seed: Whose training examples these are.
    """

    factory: ProblemFactory
    data_seed: int

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Build the problem."""
        problem = build_problem(self.factory, config, device, self.data_seed)
        if seed != self.data_seed:
            other = build_problem(self.factory, config, device, seed)
            self._take_weights(problem, other)
            for number, loader in enumerate(vars(problem.splits).values()):
                if loader is not None:
                    reseed(loader, derive_seed(seed, "order", str(number)))
        return problem

    def _take_weights(self, problem: BilevelProblem, other: BilevelProblem) -> None:
        """Copy the weights alone: buffers may hold what is known of the data, as its mean."""
        shapes = [[tuple(w.shape) for w in each.weights()] for each in (problem, other)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                "an audit of several seeds needs a factory that makes models of one size for every "
                f"seed: give seeds=1, or such a factory, got {count(problem.weights()):,} "
                f"and {count(other.weights()):,} weights"
            )
        with torch.no_grad():
            for own, new in zip(problem.weights(), other.weights(), strict=True):
                own.copy_(new)


@dataclass(frozen=True)
class LeftOut:
    """The problem, λ as its factory sets it, with one part of the training examples left out.

    Attributes:
        factory: Makes the problem.
        part: Which.
        parts: Of how many; drawn, as equal as they can be.
    """

    factory: ProblemFactory
    part: int
    parts: int

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Build the problem."""
        problem = build_problem(self.factory, config, device, seed)
        for kind in weighing_kinds(problem):
            weights = kind().detach().clone()
            weights[self.members(len(weights), self.part, self.parts)] = 0.0
            kind.transform = TRANSFORMS["none"]
            with torch.no_grad():
                kind.raw.copy_(weights)
        return problem

    @staticmethod
    def members(examples: int, part: int, parts: int) -> torch.Tensor:
        """Return the positions of the examples that are left out."""
        generator = torch.Generator().manual_seed(derive_seed("audit", "folds"))
        return torch.randperm(examples, generator=generator)[part::parts]


def weighing_kinds(problem: BilevelProblem) -> list[ExampleWeights]:
    """Return the kinds of a problem that have a weight for each training example."""
    return [m for m in problem.hyper.modules() if isinstance(m, ExampleWeights)]


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

    def refitted(self, found: Trained, seed: int) -> Trained:
        """Return a training from scratch with the λ that a run of another seed has found."""
        trial = frozen_trial(
            found.kept,
            self.reseeded,
            hyper=found.kept["hyper"],
            train_on_val=False,
            device=self._device,
        )
        facts = {"training": "refit", "hyper": _hash(found.kept["hyper"]), **self._facts(seed)}
        return self._trained(trial, f"seed-{seed}-refit", facts, f"with the λ of seed {seed}")

    def plain(self) -> Trained:
        """Return a plain training, λ as the factory sets it: that beside the run, if there is."""
        beside = TrialRecord(self._run.path / BASELINE)
        known = beside.facts()
        ended = known.get("trial"), known.get("stop_reason")
        if ended == (self.kept["trial"], StopReason.DONE) and (beside.path / MODEL).exists():
            return Trained(find_best(beside.path), float(known["gradient_equivalents"]))
        facts = {"training": "plain", **self._facts(self.kept["seed"])}
        return self._trained(self._plain(self._factory), "plain", facts, "plainly")

    def left_out(self, part: int, parts: int) -> Trained:
        """Return a plain training without a part of the training examples."""
        facts = {"training": f"without {part} of {parts}", **self._facts(self.kept["seed"])}
        trial = self._plain(LeftOut(self._factory, part, parts))
        words = f"without part {part + 1} of {parts}"
        return self._trained(trial, f"without-{part}-of-{parts}", facts, words)

    @property
    def reseeded(self) -> Reseeded:
        """The factory of the runs of other seeds."""
        return Reseeded(self._factory, self.kept["seed"])

    def _plain(self, factory: ProblemFactory) -> Trial:
        return frozen_trial(self.kept, factory, hyper=None, train_on_val=False, device=self._device)

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
                raise Interrupted("interrupted and saved: audit again to go on")
            if outcome.stop_reason is not StopReason.DONE:
                raise IFTTuneError(
                    f"a training ended {outcome.stop_reason.value}, without which there is no "
                    f"audit: see {record.path}"
                )
            known = record.facts()
        return Trained(find_best(record.path), float(known["gradient_equivalents"]))


def require_weights(problem: BilevelProblem) -> ExampleWeights:
    """Return the first of a problem's kinds that weigh each training example.

    Raises:
        UsageError: If there is none.
    """
    if kinds := weighing_kinds(problem):
        return kinds[0]
    there: list[nn.Module] = [m for m in problem.hyper.modules() if isinstance(m, HyperKind)]
    there = [m for m in there if not isinstance(m, Compose)] or [problem.hyper]
    names = sorted({type(m).__name__ for m in there})
    raise UsageError(
        "an audit needs a learned weight for each training example: put "
        "ift_tune.ExampleWeights(number of training examples) among the hyperparameters, let the "
        "training loader yield (inputs, targets, index), and run again; got "
        f"{', '.join(names)}"
    )


def _hash(state: Mapping[str, Any]) -> str:
    return fingerprint(v for v in state.values() if isinstance(v, torch.Tensor))
