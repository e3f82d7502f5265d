"""Inner steps of several runs at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ift_tune.implicit.checkpoints import repeated_as_called
from ift_tune.implicit.penalty import Penalty
from ift_tune.joint.optimizers import schedule_factor
from ift_tune.joint.packed.columns import column, norms, number, write_back
from ift_tune.joint.packed.descent import kind_of
from ift_tune.joint.packed.grounds import Standing
from ift_tune.joint.packed.losses import PackedLosses
from ift_tune.joint.packed.member import Member
from ift_tune.problem.modes import without_gradients
from ift_tune.problem.sizes import as_size


class InnerSteps:
    """The inner steps of some members, whose steps are of the same operations.

    Those with the most steps come first, and go on by themselves.
    """

    def __init__(self, members: Sequence[Member], losses: PackedLosses, standing: Standing) -> None:
        """Take the next batches of each.

        Args:
            members: The runs.
            losses: The pack's.
            standing: What the members stand on.
        """
        self._members, self._losses = members, losses.at(standing)
        self._problem = losses.problem
        self._accumulate = members[0].config.accumulate
        self._steps = [m.config.inner_steps for m in members]
        self._shares = self._of_batches = torch.zeros(0)
        self._courses = {
            split: standing.course(
                split,
                [
                    [m.walks.places(split) for _ in range(n * self._accumulate)]
                    for m, n in zip(members, self._steps, strict=True)
                ],
            )
            for split in members[0].trained_splits
        }

    def take(self, weights: Tensor, hypers: Tensor) -> None:
        """Take the steps, and hand them to the members.

        Args:
            weights: A row for each; changed.
            hypers: Likewise; they stay.

        Raises:
            PackMismatch: If the gradient of a member is another than its own.
        """
        members, steps, columns = self._members, self._steps, self._losses.weights
        longest = steps[0]
        descents = [m.inner.descent for m in members]
        kind = kind_of(descents[0].optimizer)
        if kind is None:
            raise ValueError("an optimiser that cannot be packed has come so far")
        taken = [m.course()[0] for m in members]
        descent = kind(descents, columns, taken)
        rates = descent.rates([_rates_of(m, longest) for m in members], weights)
        clips = [m.config.clip_norm for m in members]
        clip = None
        if any(c is not None for c in clips):
            clip = column([math.inf if c is None else c for c in clips], weights)
        gradient_norms = weights.new_zeros(len(members))
        update_norms = weights.new_zeros(len(members))
        first_losses: Tensor | None = None
        at_work = [sum(step < n for n in steps) for step in range(longest)]
        penalties = {rows: self._losses.penalty(hypers[:rows]) for rows in set(at_work)}
        self._shares = column([m.val_share for m in members], weights)
        self._of_batches = weights.new_full((len(members),), 1.0 / self._accumulate)
        scales = None
        if any(m.penalty_scale != 1.0 for m in members):
            scales = column([m.penalty_scale for m in members], weights).unsqueeze(1)
        with (
            without_gradients(self._problem.hypers()),
            repeated_as_called(self._problem.model, self._problem.hyper),
        ):
            for step in range(longest):
                active = at_work[step]
                now, fixed = weights[:active], hypers[:active]
                gradient, losses_now = self._gradient(now, fixed, step)
                if step == 0 and 0 in taken:
                    first_losses = losses_now
                self._penalise(gradient, penalties[active], now, scales)
                if step == 0:
                    self._compare(losses_now, gradient)
                first = at_work[step + 1] if step + 1 < longest else 0
                if first < active:  # these are at their last step
                    before = now[first:].clone()
                    gradient_norms[first:active] = norms(gradient[first:])
                if clip is not None:
                    scale = clip[:active] / (norms(gradient) + 1e-6)
                    gradient = gradient * scale.clamp(max=1.0).unsqueeze(1)
                descent.step(now, gradient, rates[step, :active])
                if first < active:
                    update_norms[first:active] = norms(now[first:] - before)
        found = [gradient_norms, update_norms]
        found += [] if first_losses is None else [first_losses]
        read = torch.stack([each.double() for each in found]).T.cpu().tolist()
        # Nothing of the members is changed before all has gone well.
        descent.close(steps)
        write_back([m.weights for m in members], columns.rows(weights))
        sizes = self._sizes()
        for member, began, (slope, update, *first) in zip(members, taken, read, strict=True):
            member.ahead.sizes = sizes * (member.config.inner_steps * self._accumulate)
            member.ahead.norms = {
                "inner_gradient_norm": number(slope),
                "inner_update_norm": number(update),
            }
            member.ahead.first_loss = number(first[0]) if first and not began else None

    def _sizes(self) -> list[float]:
        """Return the examples in a batch of each split."""
        size = self._problem.batch_size
        return [as_size(size(course.at(0, 1).batch)) for course in self._courses.values()]

    def _gradient(self, weights: Tensor, hypers: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the gradients of the training losses without the penalty, and the first losses."""
        leaf, accumulate = weights.detach().requires_grad_(), self._accumulate
        total: Tensor | None = None
        begun: Tensor | None = None
        for batch in range(step * accumulate, (step + 1) * accumulate):
            losses = self._trained(leaf, hypers, batch)
            (gradient,) = torch.autograd.grad(losses, leaf, self._of_batches[: len(leaf)])
            total = gradient if total is None else total.add_(gradient)
            begun = losses.detach() if begun is None else begun
        if total is None or begun is None:
            raise ValueError("no batch")
        return total, begun

    def _trained(self, weights: Tensor, hypers: Tensor, batch: int) -> Tensor:
        """Return what the weights are trained by, of a batch of each split that they see."""
        rows = len(weights)
        batches = {split: course.at(batch, rows) for split, course in self._courses.items()}
        losses = {}
        if "train" in batches:
            losses["train"] = self._losses.train(weights, hypers, batches["train"])
        if "val" in batches:
            losses["val"] = self._losses.val(weights, hypers, batches["val"], training=True)
        if len(losses) == 1:
            return next(iter(losses.values()))
        share = self._shares[:rows]
        return (1.0 - share) * losses["train"] + share * losses["val"]

    def _penalise(
        self, gradient: Tensor, penalty: Penalty | None, weights: Tensor, scales: Tensor | None
    ) -> None:
        """Add the gradient of the penalty, of each member as many times as it has it."""
        if penalty is None:
            return
        views = self._losses.weights.views
        with torch.no_grad():
            if scales is None:
                penalty.add_gradient_(views(gradient), views(weights))
                return
            own = torch.zeros_like(gradient)
            penalty.add_gradient_(views(own), views(weights))
            gradient.addcmul_(own, scales[: len(weights)])

    def _compare(self, losses: Tensor, gradient: Tensor) -> None:
        """Hold the first gradient of each plain training against its own."""
        rows = len(self._members)
        for row, member in enumerate(self._members):
            if member.learns or member.proven:
                continue
            batches = [
                {split: course.at(part, rows).of(row) for split, course in self._courses.items()}
                for part in range(self._accumulate)
            ]
            member.prove(losses[row], gradient[row], batches)


def _rates_of(member: Member, steps: int) -> list[float]:
    """Return the learning rate of each of the next inner steps."""
    config, (taken, total) = member.config, member.course()
    return [
        config.inner_lr
        * schedule_factor(config.inner_schedule, config.inner_warmup, taken + step, total)
        for step in range(steps)
    ]
