"""Arms that keep the sources of the training data in proportions that nobody has learned."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ift_tune.compare.arms.base import Arm, ArmSpace, Style
from ift_tune.compare.arms.standard import BaselineTrials

if TYPE_CHECKING:
    import torch

    from ift_tune.compare.comparison import Comparison
    from ift_tune.hyper import HyperKind
    from ift_tune.joint.config import MetaConfig
    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.trial.trial import ProblemFactory


@dataclass(frozen=True, kw_only=True)
class MixedTrials(BaselineTrials):
    """Plain trainings on sources in fixed proportions.

    A search varies the inner learning rate, and the coarse space of what else λ has.

    Attributes:
        proportions: The data's own, or equal ones.
    """

    proportions: Literal["proportional", "uniform"]

    def refusal(self, hyper: object) -> str | None:
        """Return None if λ has a weight for each source, and its bounds let them be such."""
        from ift_tune.base.errors import UsageError
        from ift_tune.hyper import DomainWeights, kinds_in

        kinds = kinds_in(hyper, DomainWeights)
        if not kinds:
            return "it mixes the sources of the training data, and λ has no DomainWeights"
        try:
            for kind in kinds:
                copy.deepcopy(kind).set_proportions(self.proportions)
        except UsageError as error:  # λ's floor or cap forbids them
            return f"its proportions are out of bounds: {error}"
        return None

    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        """Return the space of plain trainings without the factors of the sources."""
        from ift_tune.search.space import Space

        varied = super().space(comparison, hyper)
        fixed = _factors(hyper)
        return ArmSpace(
            Space({k: d for k, d in varied.space.distributions.items() if k not in fixed}),
            {k: value for k, value in varied.start.items() if k not in fixed},
            varied.secondary - fixed,
        )

    def problem_factory(self, comparison: Comparison) -> ProblemFactory:
        """Return one that sets the proportions."""
        return Mixed(comparison.problem_factory, self.proportions)


@dataclass(frozen=True)
class Mixed:
    """A problem factory that sets the proportions of the sources of what another makes.

    Attributes:
        problem_factory: The other.
        proportions: See `MixedTrials`.
    """

    problem_factory: ProblemFactory
    proportions: Literal["proportional", "uniform"]

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem."""
        from ift_tune.hyper import DomainWeights, kinds_in
        from ift_tune.problem.factory import build_problem

        problem = build_problem(self.problem_factory, config, device, seed)
        for kind in kinds_in(problem.hyper, DomainWeights):
            kind.set_proportions(self.proportions)
        return problem


def _factors(hyper: object) -> frozenset[str]:
    """Return the names that domain weights have in the coarse space."""
    from ift_tune.hyper import Compose, DomainWeights

    if isinstance(hyper, DomainWeights):
        return frozenset(hyper.coarse_space())
    if not isinstance(hyper, Compose):
        return frozenset()
    parts: list[tuple[str, HyperKind]] = [(name, hyper[name]) for name in hyper.kinds]
    return frozenset(f"{name}.{factor}" for name, kind in parts for factor in _factors(kind))


ARMS = (
    Arm(
        "proportional",
        label="proportional mixture",
        phrase="sampling the sources in proportion",
        summary="random search; its trainings take the sources in the proportions of the data",
        style=Style("#a0603c", (1, 1, 1, 3), "$P$"),
        trials=MixedTrials(proportions="proportional"),
        sampler="random",
    ),
    Arm(
        "uniform",
        label="uniform mixture",
        phrase="sampling the sources uniformly",
        summary="random search; its trainings take all sources in equal proportions",
        style=Style("#5b7d95", (6, 1, 2, 1), "$U$"),
        trials=MixedTrials(proportions="uniform"),
        sampler="random",
    ),
)
