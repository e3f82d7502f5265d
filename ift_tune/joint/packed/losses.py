"""A problem's losses and metrics at the weights and λ of several members at once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ift_tune.implicit.checkpoints import kept_activations
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import named
from ift_tune.joint.packed.columns import Columns
from ift_tune.joint.packed.grounds import Standing
from ift_tune.joint.packed.kernels import StackedKernels
from ift_tune.joint.packed.walks import Gathered
from ift_tune.problem.batches import Loader
from ift_tune.problem.evaluation import SplitBatches
from ift_tune.problem.losses import aligned_penalty
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size


class PackedLosses:
    """The losses of one problem as functions of matrices of weights and λ, a row for each member.

    The problem's own methods are run once for all members, by `torch.func.vmap`, with each member's
    tensors in the place of its own.

    Attributes:
        problem: Stands for those of all members.
        weights: Where its weights lie in a row.
        hypers: Where its λ lies.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        """Take the problem, whose own tensors are left alone."""
        self.problem = problem
        w, h = named(problem.model, "the model"), named(problem.hyper, "the hyperparameter module")
        self.weights = Columns([f"model.{name}" for name in w], list(w.values()))
        self.hypers = Columns([f"hyper.{name}" for name in h], list(h.values()))
        self._standing: Standing | None = None

    def at(self, standing: Standing) -> PackedLosses:
        """Return the losses of members in this order, each with what it stands on.

        Of a matrix with fewer rows, these are the first members.
        """
        found = copy.copy(self)
        found._standing = standing
        return found

    def train(self, weights: Tensor, hypers: Tensor, batch: Gathered) -> Tensor:
        """Return the training losses, shape (P,), without the penalty."""
        return self._scalars("train_loss", weights, hypers, batch)

    def val(
        self, weights: Tensor, hypers: Tensor, batch: Gathered, *, training: bool = False
    ) -> Tensor:
        """Return the validation losses, shape (P,), in evaluation mode.

        Args:
            weights: The rows.
            hypers: Those of λ.
            batch: Of the validation split.
            training: Whether the weights are trained by it: then in the mode of that.
        """
        with nullcontext() if training else evaluating(self.problem.model):
            return self._scalars("val_loss", weights, hypers, batch)

    @torch.no_grad()
    def measure(self, weights: Tensor, hypers: Tensor, batch: Gathered) -> dict[str, Tensor]:
        """Return what the problem measures on one batch, as columns of shape (P,)."""
        with evaluating(self.problem.model):
            found: dict[str, Tensor] = self._call(
                "evaluate", weights, hypers, batch.batch, batch.stacked, lambda single: [single]
            )
        return found

    @torch.no_grad()
    def evaluate(
        self, weights: Tensor, hypers: Tensor, split: str
    ) -> tuple[dict[str, Tensor], float]:
        """Return what it measures on a split, and the number of examples."""
        problem, standing = self.problem, self._standing
        passes: list[SplitBatches] = []

        def batches(offset: Tensor | None) -> SplitBatches:
            own: Loader = getattr(problem.splits, split)
            loader = own if standing is None else standing.loader(split, offset)
            passes.append(
                SplitBatches(
                    split, loader, weights.device, lambda batch: as_size(problem.batch_size(batch))
                )
            )
            return passes[-1]

        offsets = None if standing is None else standing.offsets(split)
        with evaluating(problem.model):
            found: dict[str, Tensor] = self._call(
                "evaluate", weights, hypers, offsets, offsets is not None, batches
            )
        return found, passes[-1].examples

    def penalty(self, hypers: Tensor) -> Penalty | None:
        """Return the penalty of all members; None where the problem has none.

        Args:
            hypers: Their λ.

        Raises:
            ValueError: If the penalty has no such form.
        """
        own = aligned_penalty(self.problem)
        if own is None:
            return None
        views = self.hypers.views(hypers)
        found = own.stacked([views[place] for place in self.penalised(own)])
        if found is None:
            raise ValueError(f"{type(own).__name__} has no stacked form (see Penalty.stacked)")
        return found

    def penalised(self, penalty: Penalty | None = None) -> list[int]:
        """Return the numbers of the hyperparameters that the penalty depends on, in its order."""
        own = penalty or aligned_penalty(self.problem)
        places = {id(t): i for i, t in enumerate(self.problem.hypers())}
        return [] if own is None else [places[id(t)] for t in own.hypers]

    def _scalars(self, method: str, weights: Tensor, hypers: Tensor, batch: Gathered) -> Tensor:
        found: Any = self._call(method, weights, hypers, batch.batch, batch.stacked)
        if not isinstance(found, Tensor) or found.shape != (len(weights),):
            raise ValueError(f"{method} returned no scalar tensor")
        return found

    def _call(
        self,
        method: str,
        weights: Tensor,
        hypers: Tensor,
        batch: Any,
        stacked: bool,
        given: Callable[[Any], Any] = lambda argument: argument,
    ) -> Any:
        """Run a method of the problem for all rows.

        Args:
            method: Its name.
            weights: The rows.
            hypers: Those of λ.
            batch: Its argument.
            stacked: Whether that has an entry for each row.
            given: What the method is given in the place of a row's argument.
        """
        module = _Method(self.problem, method)

        def one(values: Mapping[str, Tensor], argument: Any) -> Any:
            return functional_call(module, dict(values), (given(argument),))

        values = self.weights.named(weights) | self.hypers.named(hypers)
        if self._standing is not None:
            constants = self._standing.constants
            values |= {name: every[: len(weights)] for name, every in constants.items()}
        with StackedKernels(), kept_activations(), warnings.catch_warnings():
            # An operation without a rule of its own is done row by row: slower, and right.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if stacked:
                return vmap(one, in_dims=(0, 0))(values, batch)
            return vmap(lambda row: one(row, batch))(values)


class _Method(nn.Module):
    """A method of a problem as a module's forward, over its weights and its λ."""

    def __init__(self, problem: BilevelProblem, method: str) -> None:
        super().__init__()
        self.model, self.hyper = problem.model, problem.hyper
        self.training = problem.model.training
        self._method = getattr(problem, method)

    def forward(self, argument: Any) -> Any:
        return self._method(argument)
