"""The problems of an audit's further trainings: the run's own, with one thing changed in each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import derive_seed
from ift_tune.hyper import Compose, ExampleWeights, HyperKind, kinds_in
from ift_tune.hyper.transforms import TRANSFORMS
from ift_tune.implicit.vectors import count
from ift_tune.joint.config import MetaConfig
from ift_tune.problem.factory import build_problem
from ift_tune.problem.loaders import reseed
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.trial import ProblemFactory


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
        for kind in kinds_in(problem.hyper, ExampleWeights):
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


@dataclass(frozen=True)
class OnValidation:
    """The problem with its validation split in the place of the training split.

    No hyperparameter acts on the data or the loss; a penalty stays, as the factory sets it.

    Attributes:
        factory: Makes the problem.
    """

    factory: ProblemFactory

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Build the problem."""
        problem = build_problem(self.factory, config, device, seed)
        problem.splits = replace(problem.splits, train=problem.splits.val, curvature=None)
        problem.train_loss = problem.val_loss  # type: ignore[method-assign]
        return problem


def require_weights(problem: BilevelProblem) -> ExampleWeights:
    """Return the first of a problem's kinds that weigh each training example.

    Raises:
        UsageError: If there is none.
    """
    if kinds := kinds_in(problem.hyper, ExampleWeights):
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
