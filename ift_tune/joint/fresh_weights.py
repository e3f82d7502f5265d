"""Weights that begin anew while λ goes on: when, and as what.

Weights that are kept over all outer steps remember λ's whole path, and a net that can memorise its
training data ends at a training loss of zero, where λ has no influence left (Vicol et al. 2022).
Weights that begin anew every few outer steps are trained by the present λ alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import derive_seed
from ift_tune.implicit.vectors import named
from ift_tune.joint.config import MetaConfig
from ift_tune.problem.factory import build_problem
from ift_tune.problem.problem import BilevelProblem

ProblemFactory = Callable[..., Any]


class FreshWeights:
    """When the weights of a run begin anew, and the weights that they then are.

    These are what the problem's factory builds for another seed, so that a model's own way of
    initialising, or what it was pretrained to, is kept. From the problem of the other seed only the
    weights are taken. Buffers and frozen parameters are those that the run began with: what they
    hold of the data is of this run's training split.

    Attributes:
        outer_steps: Those of the run when the present weights began.
        inner_steps: Likewise.
        first_loss: The training loss of the first batch that the present weights were trained on;
            None before that.
        loss: The training loss in the latest outer step; None before the first.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        config: MetaConfig,
        factory: ProblemFactory | None,
        seed: int,
    ) -> None:
        """Keep what the model begins with.

        Args:
            problem: As its factory has built it.
            config: Says when weights begin anew.
            factory: That one; None where the weights are never to begin anew.
            seed: The run's, from which those of the weights are derived.
        """
        self._problem, self._config, self._factory, self._seed = problem, config, factory, seed
        self.outer_steps = self.inner_steps = 0
        self.first_loss: float | None = None
        self.loss: float | None = None
        self._kept = _others(problem) if self._wanted else {}

    @property
    def _wanted(self) -> bool:
        return self._config.reinit_every > 0 or self._config.reinit_below > 0.0

    def require_factory(self) -> None:
        """Refuse a run whose weights are to begin anew some day, and which cannot build them.

        Raises:
            UsageError: If there is no factory.
        """
        if self._wanted and self._factory is None:
            config = self._config
            raise UsageError(
                "weights that begin anew must have a factory that builds them: give JointOptimizer "
                "its problem_factory=, or leave out reinit_every and reinit_below, got "
                f"reinit_every={config.reinit_every} and reinit_below={config.reinit_below:g}"
            )

    def due(self, outer_steps: int) -> bool:
        """Return whether the weights begin anew before the next outer step.

        Args:
            outer_steps: Those that have been taken.
        """
        age, config = outer_steps - self.outer_steps, self._config
        if age == 0:
            return False
        if 0 < config.reinit_every <= age:
            return True
        if self.first_loss is None or self.loss is None or self.first_loss <= 0.0:
            return False  # of what is not above 0 there is no share to fall below
        return self.loss < config.reinit_below * self.first_loss

    def begin(self, outer_steps: int, inner_steps: int) -> None:
        """Let the weights begin anew.

        Args:
            outer_steps: Those that have been taken. Which weights come depends on nothing else but
                the run's seed, so that a resumed run has the same.
            inner_steps: Likewise.

        Raises:
            UsageError: If the factory builds other tensors for another seed.
        """
        if self._factory is None:
            raise ValueError("it is not due without a factory")
        mine = named(self._problem.model, "the model")
        device = next(iter(mine.values())).device
        seed = derive_seed(self._seed, "weights", outer_steps)
        fresh = build_problem(self._factory, self._config, device, seed)
        theirs = named(fresh.model, "the model")
        shapes = [{n: tuple(t.shape) for n, t in each.items()} for each in (mine, theirs)]
        if shapes[0] != shapes[1]:
            apart = sorted(n for n in {*mine, *theirs} if shapes[0].get(n) != shapes[1].get(n))
            raise UsageError(
                "weights can begin anew only where the factory builds the same model for every "
                f"seed: leave out reinit_every and reinit_below, got another {', '.join(apart[:3])}"
            )
        with torch.no_grad():
            for name, weight in mine.items():
                weight.copy_(theirs[name])
            for name, tensor in _others(self._problem, copies=False).items():
                tensor.copy_(self._kept[name])
        self.outer_steps, self.inner_steps = outer_steps, inner_steps
        self.first_loss = self.loss = None

    def course(self, inner_steps: int, total: int | None) -> tuple[int, int | None]:
        """Return the inner steps of the present weights: those taken, and those of all of them.

        A schedule of the learning rate begins anew with the weights and leads to their end, which
        is known of `reinit_every`, and otherwise is that of the whole run.

        Args:
            inner_steps: Those that the run has taken.
            total: Those of the whole run, if its end is known.
        """
        taken = inner_steps - self.inner_steps
        ends = [] if total is None else [total - self.inner_steps]
        if self._config.reinit_every:
            ends.append(self._config.reinit_every * self._config.inner_steps)
        return taken, min(ends, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return where the present weights began, and what decides on their end."""
        return {
            "outer_steps": self.outer_steps,
            "inner_steps": self.inner_steps,
            "first_loss": self.first_loss,
            "loss": self.loss,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state; that of before weights could begin anew is None."""
        state = state or {}
        self.outer_steps = state.get("outer_steps", 0)
        self.inner_steps = state.get("inner_steps", 0)
        self.first_loss, self.loss = state.get("first_loss"), state.get("loss")


def _others(problem: BilevelProblem, *, copies: bool = True) -> dict[str, Tensor]:
    """Return the tensors of the model that are not trained, by name."""
    model = problem.model
    found: dict[str, Tensor] = dict(model.named_buffers())
    found |= {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return {n: t.detach().clone() if copies else t.detach() for n, t in found.items()}
