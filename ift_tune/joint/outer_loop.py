"""Steps of λ along hypergradients, and what one leaves for the next."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor

from ift_tune.base.errors import UnreachableHyperparameterError
from ift_tune.base.randomness import GlobalState, RandomStream, drawn_again
from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.hypergradient import Begun, Hypergradient, WarmStart, begin
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import Tensors, conform, count, dot, flatten, joined, norm
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.difference_check import check_differences
from ift_tune.joint.optimizers import Descent
from ift_tune.joint.room import Room
from ift_tune.joint.start_check import StartCheck, check_start
from ift_tune.problem.batches import Batch, to_device
from ift_tune.problem.in_use import idle_parts, refuse_idle
from ift_tune.problem.loaders import once_through
from ift_tune.problem.losses import linearise_problem
from ift_tune.problem.micro_batches import MicroBatch
from ift_tune.problem.problem import BilevelProblem

T = TypeVar("T")

_log = logging.getLogger(__name__)
_LOOKED_AT = 64  # batches, for a hyperparameter that the present one lacks


class OuterLoop:
    """Takes steps of λ along hypergradients.

    Attributes:
        warm: What the last usable solve left for the next.
    """

    def __init__(self, problem: BilevelProblem, config: MetaConfig, inner: Descent) -> None:
        """Make the optimiser of λ.

        Args:
            problem: Whose λ it is.
            config: How.
            inner: The optimiser of the weights, whose memory counts too.
        """
        self._problem, self._hypers = problem, problem.hypers()
        self.descent = Descent(
            problem.configure_outer(list(self._hypers), config),
            "configure_outer",
            self._hypers,
            config.meta_optimizer,
            config.meta_lr,
        )
        # Never saved: a resumed run builds the same problem, and so begins at the same λ.
        self.start = [_compact(h.detach()) for h in self._hypers]
        self.scale = _spread(self.start) or 1.0
        self._room = Room(problem, config, inner, self.start)
        self.warm = WarmStart()
        self._elsewhere: set[str] = set()  # hyperparameters that a batch may do without
        self._in_use = False  # whether all parts of λ are known to be

    def hypergradient(
        self, config: MetaConfig, train_batch: Batch, val_batch: Batch
    ) -> Hypergradient:
        """Return the hypergradient at the present weights."""
        return self.begin(config, train_batch, val_batch).result.read()

    def begin(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        penalty: Penalty | None = None,
        val_parts: Sequence[Batch] = (),
    ) -> Begun:
        """Return the same, with its numbers unread: the device goes on meanwhile.

        Args:
            config: How.
            train_batch: For the training loss.
            val_batch: For the validation loss.
            penalty: That of the inner steps, if λ is where it was then.
            val_parts: Of the validation batch, for the signal over the noise.
        """

        def take() -> Begun:
            linearisation = self.linearise(config, train_batch, val_batch, penalty, val_parts)
            return self._begin(linearisation, config, val_batch)

        return self._room.found(take, train_batch, val_batch, self.descent, self.warm)

    def begin_checked(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        val_parts: Sequence[Batch] = (),
    ) -> tuple[Begun, StartCheck | None]:
        """Return the hypergradient, and what the check at the start says of its products.

        The check is made on the linearisation that is solved with, so that it takes nothing from a
        loader. None where a loss or its gradient is not finite: there is nothing to compare.

        Raises:
            StartCheckError: If the check finds something wrong.
        """
        return self._room.found(
            lambda: self._checked(config, train_batch, val_batch, val_parts),
            train_batch,
            val_batch,
            self.descent,
            self.warm,
            usual=False,
        )

    def _checked(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        val_parts: Sequence[Batch],
    ) -> tuple[Begun, StartCheck | None]:
        linearisation, found = self.linearise_checked(config, train_batch, val_batch, val_parts)
        return self._begin(linearisation, config, val_batch), found

    def linearise_checked(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        val_parts: Sequence[Batch] = (),
    ) -> tuple[Linearisation, StartCheck | None]:
        """Return the problem linearised on two batches, and what the check says of it.

        Raises:
            StartCheckError: If the check finds something wrong.
        """
        device = self._hypers[0].device
        before = GlobalState(device)
        linearisation = self.linearise(config, train_batch, val_batch, val_parts=val_parts)
        found = None
        losses = float(linearisation.train_loss + linearisation.val_loss)
        if math.isfinite(losses) and math.isfinite(linearisation.gradient_norm()):
            with drawn_again(before, device):  # whatever is drawn inside is not drawn for the run
                check = check_differences if config.products == "difference" else check_start
                judged, one, two = linearisation, train_batch, val_batch
                if self._room.micro_batch is not None:  # on the first of the parts, for its memory
                    one, two = self._room.first(train_batch, val_batch)
                    with drawn_again(before, device):
                        judged = linearise_problem(self._problem, one, two, **_how(config))
                found = check(self._problem, judged, one, two, lambda: drawn_again(before, device))
        return linearisation, found

    def _begin(self, linearisation: Linearisation, config: MetaConfig, val_batch: Batch) -> Begun:
        def take() -> Begun:
            return begin(linearisation, config.inverse, self.warm, self._elsewhere)

        return self._wherever_reached(take, config, val_batch)

    def contract(
        self, linearisation: Linearisation, solution: Tensors, config: MetaConfig, val_batch: Batch
    ) -> list[Tensor]:
        """Return the hypergradient for a solution that is known already."""

        def take() -> list[Tensor]:
            return linearisation.contract(solution, self._elsewhere)

        return self._wherever_reached(take, config, val_batch)

    def _wherever_reached(self, take: Callable[[], T], config: MetaConfig, val_batch: Batch) -> T:
        """Return what is taken of a batch, which may lack hyperparameters that others have."""
        # Once, and not in each step: a module that has been called is not taken out again.
        if not self._in_use:
            if idle_parts(self._problem):
                self._look_elsewhere((), config, val_batch)
            self._in_use = True
        try:
            return take()
        except UnreachableHyperparameterError as error:
            self._look_elsewhere(error.names, config, val_batch)
        return take()

    def _look_elsewhere(self, names: Sequence[str], config: MetaConfig, val_batch: Batch) -> None:
        """Note hyperparameters that this batch lacks, as of a domain or class, and others have.

        Parts of λ too, as the scale of an adapter that only some batches come by.

        Raises:
            UnreachableHyperparameterError: If no batch has one of them: that is a mistake.
        """
        splits, device = self._problem.splits, self._hypers[0].device
        missing = set(names)
        with RandomStream(0, device).aside():
            for batch in islice(once_through(splits.curvature or splits.train), _LOOKED_AT):
                there = self.linearise(config, to_device(batch, device), val_batch)
                if missing:
                    missing -= there.reached()
                if not missing and not idle_parts(self._problem):
                    self._elsewhere |= set(names)
                    return
        if missing:
            raise UnreachableHyperparameterError(sorted(missing))
        refuse_idle(idle_parts(self._problem))

    def linearise(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        penalty: Penalty | None = None,
        val_parts: Sequence[Batch] = (),
    ) -> Linearisation:
        """Return the problem linearised on two batches, in the way that is configured."""
        return linearise_problem(
            self._problem,
            train_batch,
            val_batch,
            penalty=penalty,
            micro_batch=self._room.micro_batch,
            val_parts=val_parts,
            **_how(config),
        )

    @property
    def micro_batch(self) -> MicroBatch | None:
        """In which parts batches are taken; None for whole."""
        return self._room.micro_batch

    @property
    def runs_again(self) -> bool:
        """Whether each exact product computes its gradient again, or may come to."""
        return self._room.runs_again

    @property
    def runs_anew(self) -> bool:
        """Whether products make what they need of the training loss anew, its penalty too."""
        return self._room.runs_anew

    def update(self, result: Hypergradient, config: MetaConfig) -> None:
        """Take a step of λ, unless the hypergradient is unusable: then λ stays as it is."""
        if not result.usable:
            _log.info(
                "λ left alone: the hypergradient is unusable (%s, relative residual %s). %s",
                result.status.value,
                result.stats.relative_residual,
                result.status.advice,
            )
            # A diverged q would be the worst of guesses, but it has shown what λ_max is.
            self.warm = WarmStart(eigenpair=result.warm.eigenpair)
            return
        for hyper, gradient in zip(self._hypers, result.grads, strict=True):
            hyper.grad = conform(gradient, hyper)
        self.descent.step()
        self.descent.optimizer.zero_grad(set_to_none=True)
        # The eigenvector is always worth keeping: it saves products, where a guess costs one.
        self.warm = result.warm if config.warm_start else WarmStart(eigenpair=result.warm.eigenpair)

    def agreement(self, gradients: Tensors, length: Tensor) -> Later[float | None]:
        """Return the cosine of a hypergradient with the optimiser's mean of the earlier ones.

        To be asked before `update`. Of hypergradients that are signal alone it is 1, of noise alone
        0. None where there is no such mean: at the first step, and where the optimiser keeps none.

        Args:
            gradients: The hypergradient.
            length: Its norm.
        """
        mean = self.mean()
        if mean is None:
            return Later([], lambda _: None)

        def cosine(numbers: list[float]) -> float | None:
            product, one, other = numbers
            return product / (one * other) if one * other > 0.0 else None

        product = dot(joined(mean), joined(gradients))
        return Later([product, norm(mean), length], cosine)

    def begin_anew(self) -> None:
        """Forget what earlier solves have left: it was of other weights. λ's optimiser goes on."""
        self.warm = WarmStart()

    def mean(self) -> list[Tensor] | None:
        """Return the optimiser's mean of the earlier hypergradients; None where it has none."""
        states = [self.descent.optimizer.state.get(h, {}) for h in self._hypers]
        mean = [state.get("exp_avg", state.get("momentum_buffer")) for state in states]
        found = [m for m in mean if m is not None]
        return found if len(found) == len(mean) else None

    def change(self) -> float:
        """Return how far λ is from where it began; see `JointOptimizer.hyper_change`."""
        moved = norm([h.detach() - s for h, s in zip(self._hypers, self.start, strict=True)])
        return float(moved) / math.sqrt(count(self.start)) / self.scale

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state and the warm start."""
        pair = self.warm.eigenpair
        return {
            "outer_optimizer": self.descent.state_dict(),
            "warm_solution": self.warm.solution,
            "warm_eigenpair": None if pair is None else [pair.value, pair.vector],
            "micro_batch": self._room.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, at the learning rate of the present configuration."""
        self.descent.load_state_dict(state["outer_optimizer"])
        device = self._hypers[0].device
        pair = to_device(state["warm_eigenpair"], device)
        solution = to_device(state["warm_solution"], device)
        self.warm = WarmStart(solution, None if pair is None else Eigenpair(*pair))
        self._room.load_state(state.get("micro_batch"))  # older checkpoints have none


def _how(config: MetaConfig) -> dict[str, Any]:
    """Return how products are made, as `linearise_problem` is told."""
    return {
        "gauss_newton": config.curvature == "gauss_newton",
        "products": config.products,
    }


def _compact(tensor: Tensor) -> Tensor:
    """Return a copy, of a single number where all entries are equal: a million equal decays."""
    if tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
        return tensor.reshape(-1)[0].clone().expand(tensor.shape)
    return tensor.clone()


def _spread(tensors: Tensors) -> float:
    """Return the standard deviation of all entries; 0 where they are equal, to rounding."""
    every = flatten(tensors).double()
    spread = float(every.std(correction=0))
    return spread if spread > 1e-6 * float(every.abs().max()) else 0.0
