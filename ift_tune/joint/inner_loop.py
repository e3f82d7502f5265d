"""Inner steps: the weights are trained at a constant λ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.implicit.checkpoints import repeated_as_called
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.process_group import sum_gradients_, summed
from ift_tune.implicit.vectors import Tensors, norm, sub
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.cost import GRADIENT, Cost
from ift_tune.joint.optimizers import Descent, schedule_factor
from ift_tune.joint.splits import Walks
from ift_tune.problem.losses import aligned_penalty, own_loss
from ift_tune.problem.modes import without_gradients
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size


class InnerLoop:
    """Takes steps of the weights; λ is constant, and only the data loss goes through autograd."""

    def __init__(
        self, problem: BilevelProblem, config: MetaConfig, walks: Walks, device: torch.device
    ) -> None:
        """Make the optimiser of the weights.

        Raises:
            UsageError: If the problem brings one that is none, or brings its own schedule beside
                that of the configuration.
        """
        self._problem, self._config, self.walks = problem, config, walks
        self._weights, self._hypers = problem.weights(), problem.hypers()
        self._names = _names(problem)
        self.descent = Descent(
            problem.configure_inner(list(self._weights), config),
            "configure_inner",
            self._weights,
            config.inner_optimizer,
            config.inner_lr,
            momentum=config.inner_momentum,
        )
        if self.descent.own and (config.inner_schedule != "constant" or config.inner_warmup):
            raise UsageError(
                "the problem's configure_inner brings an optimiser of its own, whose learning rate "
                "inner_schedule and inner_warmup do not change: return a scheduler with it"
            )
        low = partial(torch.autocast, device.type, torch.bfloat16)
        self._start = copy.deepcopy(self.descent.state_dict())
        self._precision: Callable[[], AbstractContextManager[Any]] = (
            low if config.precision == "bfloat16" else nullcontext
        )
        self._one: Tensor | None = None
        self.penalty: Penalty | None = None  # of the last steps, at the λ of then
        self.norms: dict[str, Tensor] = {}  # of the last step; read with the rest of an outer step
        self.first_loss: Tensor | None = None  # of fresh weights, until it is read with the rest

    def begin_anew(self) -> None:
        """Let the optimiser be as before its first step, for weights that begin anew."""
        self.descent.load_state_dict(copy.deepcopy(self._start))
        for weight in self._weights:
            weight.grad = None
        self.penalty, self.norms, self.first_loss = None, {}, None

    def inherit(self, state: Mapping[str, Any] | None, taken: int) -> None:
        """Let the optimiser go on where one with other settings has come to.

        Args:
            state: Of that one; None: it is of another kind.
            taken: The steps that the present weights have taken.
        """
        self.begin_anew()
        self.descent.inherit(state, taken)

    def require_same_tensors(self) -> None:
        """Refuse a problem whose trainable tensors are no longer those of the optimisers.

        Raises:
            UsageError: If some have been frozen, unfrozen or replaced; they are named.
        """
        present, known = self._problem.weights(), self._weights
        present, known = [*present, *self._problem.hypers()], [*known, *self._hypers]
        if [id(t) for t in present] == [id(t) for t in known]:
            return
        names = _names(self._problem)
        changed = [n for i, n in names.items() if i not in self._names]
        changed += [n for i, n in self._names.items() if i not in names and n not in changed]
        raise UsageError(
            "trainable tensors must stay the same ones while a run goes on: freeze, unfreeze or "
            "replace them before its JointOptimizer is made, and copy values in place; got others "
            f"for {', '.join(changed[:3]) or 'weights()'}{', ...' * (len(changed) > 3)}"
        )

    def train(
        self,
        steps: int,
        cost: Cost,
        *,
        taken: int,
        total: int | None,
        val_share: float = 0.0,
        penalty_scale: float = 1.0,
    ) -> None:
        """Take steps.

        Args:
            steps: How many.
            cost: What they cost is added to it.
            taken: Those that the present weights have taken before.
            total: Those of their whole training, for schedules with an end.
            val_share: The weight of the validation loss in what is minimised, beside one minus it
                of the training loss: 0 but for a baseline that trains on the validation split.
            penalty_scale: What the penalty is multiplied by.
        """
        problem, config = self._problem, self._config
        # In closed form and built once: no step builds a graph to λ, and whatever depends on λ
        # alone (a softplus over a million decays) is computed once for all of them.
        penalty = self.penalty = aligned_penalty(problem)
        with (
            without_gradients(self._hypers),
            repeated_as_called(problem.model, problem.hyper),
        ):
            for step in range(taken, taken + steps):
                for weight in self._weights:
                    weight.grad = None
                for _ in range(config.accumulate):
                    loss = self._add_gradient(cost, val_share)
                    if step == 0 and self.first_loss is None:
                        (self.first_loss,) = summed([loss.detach()], [loss])
                for weight in self._weights:
                    # Of nn.Embedding(sparse=True): neither a penalty nor a norm takes that form.
                    if weight.grad is not None and weight.grad.layout is not torch.strided:
                        weight.grad = weight.grad.to_dense()
                sum_gradients_(self._weights)
                if penalty is not None:
                    self._add_penalty(penalty, penalty_scale)
                last = step == taken + steps - 1
                before = []
                if last:
                    with torch.no_grad():
                        before = [w.clone() for w in self._weights]
                    self.norms["inner_gradient_norm"] = norm(_gradients(self._weights))
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self._weights, config.clip_norm)
                self.descent.step(
                    schedule_factor(config.inner_schedule, config.inner_warmup, step, total)
                )
                if last:
                    with torch.no_grad():
                        self.norms["inner_update_norm"] = norm(sub(self._weights, before))

    def _add_penalty(self, penalty: Penalty, scale: float) -> None:
        """Add a multiple of the penalty's gradient to the weights'."""
        gradient = [_gradient(w) for w in self._weights]
        if scale == 1.0:
            penalty.add_gradient_(gradient, self._weights)
            return
        own = [torch.zeros_like(g) for g in gradient]
        penalty.add_gradient_(own, self._weights)
        torch._foreach_add_(gradient, own, alpha=scale)

    def _add_gradient(self, cost: Cost, val_share: float) -> Tensor:
        """Add the gradient of the loss of one batch, over `accumulate`, to the weights'.

        Returns:
            The loss: where several processes share it, the part that this one adds.
        """
        with self._precision():
            loss = self._loss(cost, val_share)
        mean = loss / self._config.accumulate if self._config.accumulate > 1 else loss
        if self._one is None or self._one.dtype != mean.dtype:
            self._one = torch.ones_like(mean, requires_grad=False)  # else made anew in each step
        mean.backward(self._one)  # type: ignore[no-untyped-call]
        return loss

    def _loss(self, cost: Cost, val_share: float) -> Tensor:
        """Return the loss of one batch of each split that is trained on; their cost is added."""
        problem, losses = self._problem, []
        for split, share in (("train", 1.0 - val_share), ("val", val_share)):
            if not share:
                continue
            batch = self.walks.next(split)
            size = as_size(problem.batch_size(batch))
            cost.unit = cost.unit or size
            loss = own_loss(problem, f"{split}_loss", batch)
            losses.append(loss if share == 1.0 else share * loss)
            cost.add(GRADIENT, size)
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]


def _names(problem: BilevelProblem) -> dict[int, str]:
    """Return the name of each trainable tensor of a problem, by identity."""
    modules = {"model": problem.model, "hyper": problem.hyper}
    return {
        id(tensor): f"{owner}.{name}"
        for owner, module in modules.items()
        for name, tensor in module.named_parameters()
        if tensor.requires_grad
    }


def _gradient(weight: Tensor) -> Tensor:
    """Return the weight's gradient, zeros where the data loss does not see it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _gradients(weights: Tensors) -> list[Tensor]:
    return [w.grad for w in weights if w.grad is not None]
