"""A joint optimiser in several processes, each of which computes on its share of every batch.

All of them build the same problem, draw the same batches with the same random numbers, and take the
same steps: sums over their shares stand where one process has derivatives of the whole batch (see
`process_group`). That they hold the same bits is compared in each outer step, and so are the losses
of whole batches with the sums of their shares' losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.process_group import ProcessGroup, checksum, summed, undivided
from ift_tune.implicit.vectors import fill_missing, norm, sub
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer, OuterStepHooks
from ift_tune.problem.batches import Batch, tensors_of, to_device
from ift_tune.problem.loaders import first_batch
from ift_tune.problem.losses import loss_values, outer_losses
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.shares import ONE_PROCESS, not_shareable

Announce = Callable[..., AbstractContextManager[None]]
"""``announce(method, arguments, total_steps)``: the others call the method too, meanwhile."""

# How far sums over shares may be from the whole, relative to it, in roundings of the weights' type:
# of a loss, and of a gradient, whose terms cancel.
_ROUNDINGS = 1e3
_ROUNDINGS_OF_GRADIENTS = 1e4
_LEAST = 1e-3  # of the largest loss so far: what is smaller is taken for as large

_SHARED = {"products": "exact", "memory_budget": None}
"""Settings of how products are taken, at the values at which they are summed over processes."""


class DataParallelOptimizer(JointOptimizer):
    """A `JointOptimizer` whose losses the processes of a group share.

    Each process has one, and each has to make the same calls; `trial.team.Team` sees to that. What
    only measures (`evaluate`, `count_examples`) needs nobody else, and the leader alone calls it.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        config: MetaConfig,
        *,
        group: ProcessGroup,
        announce: Announce | None = None,
        seed: int = 0,
        callbacks: Sequence[OuterStepHooks] = (),
        problem_factory: Callable[..., Any] | None = None,
    ) -> None:
        """Build it, as a `JointOptimizer`.

        Args:
            problem: What to optimise; the same in each process.
            config: How.
            group: The processes.
            announce: Of the leader: lets the others make a call too.
            seed: Of the random numbers drawn while stepping.
            callbacks: Called in order; of the leader alone.
            problem_factory: What has built the problem.

        Raises:
            UsageError: If the configuration takes derivatives in a way that is not shared.
        """
        _require_graphs(config)
        super().__init__(
            problem, config, seed=seed, callbacks=callbacks, problem_factory=problem_factory
        )
        self._group = group
        self._announce: Announce = announce or (lambda *_: nullcontext())
        self._seen = torch.zeros((), dtype=torch.int64, device=self.device)
        self._walks.watch = self._see
        self._eps = max(torch.finfo(w.dtype).eps for w in problem.weights())
        self._largest: dict[str, float] = {}  # value of each loss so far

    def step(self) -> dict[str, float]:
        """Take a step, in all processes; see `JointOptimizer.step`.

        Raises:
            UsageError: If a loss is not the mean of its shares', or the processes have come apart.
        """
        with self._everywhere("step"):
            return super().step()

    def baseline_step(
        self,
        *,
        train_on_val: bool = False,
        val_weight: float = 1.0,
        penalty_weight: float | None = None,
    ) -> dict[str, float]:
        """Take the inner steps of a step, in all processes; see `JointOptimizer.baseline_step`."""
        how: dict[str, Any] = {"train_on_val": train_on_val, "val_weight": val_weight}
        how["penalty_weight"] = penalty_weight
        with self._everywhere("baseline_step", **how):
            found = super().baseline_step(**how)
            self._require_same()
            return found

    def train_weights(self, steps: int) -> None:
        """Take inner steps, in all processes."""
        with self._everywhere("train_weights", steps=steps):
            super().train_weights(steps)
            self._require_same()

    def begin_anew(self) -> None:
        """Let the weights begin anew if that is due, in all processes."""
        if self._fresh.due(self.outer_steps):
            with self._everywhere("begin_anew"):
                super().begin_anew()

    def hypergradient(self) -> Hypergradient:
        """Return the hypergradient on the next batches, which all processes take."""
        with self._everywhere("hypergradient"):
            return super().hypergradient()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, of any number of processes, in all of these."""
        with self._everywhere("load_state_dict", state=state):
            super().load_state_dict(state)

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over another run's weights and λ, in all processes."""
        with self._everywhere("inherit", state=state):
            super().inherit(state)

    def close(self) -> None:
        """End the loaders' worker processes, in all processes."""
        with self._everywhere("close"):
            super().close()

    def check_shares(self) -> None:
        """Compare losses and derivatives of the first batches with the sums over their shares.

        Nothing is trained before: it takes a gradient of each loss, of the whole batch and of the
        shares; without `start_check` only what the processes hold is compared.

        Raises:
            UsageError: If one is another, or the processes hold other data, weights or λ.
        """
        with self._everywhere("check_shares"), self._stepping("check_shares()"):
            splits = self.problem.splits
            with self._random.aside():
                firsts = {
                    name: to_device(first_batch(name, loader), self.device)
                    for name, loader in vars(splits).items()
                    if loader is not None
                }
            self._require_same(**{f"{name} data": tensors_of(b) for name, b in firsts.items()})
            if self.config.start_check:
                # In the same order everywhere, which a set's is not.
                for name in dict.fromkeys(["train", self._walks.curvature]):
                    self._compare_derivatives(firsts[name], firsts["val"])

    @contextlib.contextmanager
    def _everywhere(self, method: str, **arguments: Any) -> Iterator[None]:
        with self._announce(method, arguments, self.total_steps):
            yield

    @contextlib.contextmanager
    def _stepping(self, what: str) -> Iterator[None]:
        with super()._stepping(what), self._group.active():
            yield

    def _call(self, hook: str, *arguments: Any) -> None:
        with undivided():  # the other processes have no callbacks, and would not take part
            super()._call(hook, *arguments)

    def _update_hypers(self) -> dict[str, float]:
        metrics = super()._update_hypers()
        self._require_same()
        return metrics

    def _see(self, batch: Batch) -> None:
        """Note a batch, without waiting for it."""
        self._seen = self._seen * 31 + checksum(tensors_of(batch)).to(self.device)

    def _require_same(self, **further: list[Tensor]) -> None:
        """Compare what the processes hold.

        Raises:
            UsageError: In all of them, if they differ.
        """
        model, hyper = self.problem.model, self.problem.hyper
        held: dict[str, list[Tensor]] = {
            "weights": [*model.parameters(), *model.buffers()],
            "λ": list(hyper.parameters()),
        }
        sums = {name: checksum(tensors) for name, tensors in (held | further).items()}
        if apart := self._group.differing({"batches": self._seen, **sums}):
            raise UsageError(
                f"the processes of a trial must have the same {' and '.join(apart)}: make a "
                "problem from its seed alone, loaders with an order drawn from it, and leave "
                f"weights and λ as they are in callbacks, {ONE_PROCESS}; got others in some "
                f"process after {self.outer_steps} outer steps"
            )

    def _compare(self, result: Hypergradient, train_batch: Batch, val_batch: Batch) -> None:
        """Hold the losses of an outer step, which are sums over shares, against the whole ones."""
        with undivided(), drawn_again(GlobalState(self.device), self.device):
            before = _drawn(self.device)
            whole = loss_values(self.problem, train_batch, val_batch)
            drawn = not torch.equal(before, _drawn(self.device))
        found = {"train_loss": float(result.train_loss), "val_loss": float(result.val_loss)}
        self._judge(found, whole, drawn=drawn)

    def _judge(
        self, found: Mapping[str, float], whole: Mapping[str, float], *, drawn: bool
    ) -> None:
        wrong = []
        for name, value in whole.items():
            size = max(abs(value), abs(found[name]))
            if not math.isfinite(size):  # which is told of elsewhere
                continue
            self._largest[name] = max(size, self._largest.get(name, 0.0))
            allowed = _ROUNDINGS * self._eps * max(size, _LEAST * self._largest[name])
            if abs(value - found[name]) > allowed:
                wrong.append((name, f"{value:.9g}, and {found[name]:.9g} of the shares"))
        self._refuse_if(wrong, drawn=drawn)

    def _compare_derivatives(self, train_batch: Batch, val_batch: Batch) -> None:
        before = GlobalState(self.device)
        with undivided(), drawn_again(before, self.device):
            start = _drawn(self.device)
            whole = self._derivatives(train_batch, val_batch)
            drawn = not torch.equal(start, _drawn(self.device))
        with drawn_again(before, self.device):
            shared = self._derivatives(train_batch, val_batch)
        values = ({name: loss for name, (loss, *_) in each.items()} for each in (shared, whole))
        self._judge(*values, drawn=drawn)
        wrong = []
        for name, (_, *parts) in whole.items():
            for by, right, found in zip(("weights", "λ"), parts, shared[name][1:], strict=True):
                off, size = float(norm(sub(found, right))), float(norm(right))
                if off > _ROUNDINGS_OF_GRADIENTS * self._eps * size + self._eps:
                    what = f"the derivative of {name} by the {by}"
                    wrong.append((what, f"a difference of {off / max(size, self._eps):.1%}"))
        self._refuse_if(wrong, drawn=drawn)

    def _derivatives(
        self, train_batch: Batch, val_batch: Batch
    ) -> dict[str, tuple[float, list[Tensor], list[Tensor]]]:
        """Return each loss, and its derivatives by the weights and by λ."""
        weights, hypers = self.problem.weights(), self.problem.hypers()
        every = [*weights, *hypers]
        found = {}
        losses = outer_losses(self.problem, train_batch, val_batch)
        for name, loss in zip(("train_loss", "val_loss"), losses, strict=True):
            parts = torch.autograd.grad(loss, every, allow_unused=True, retain_graph=True)
            filled = fill_missing(summed(parts, every), every)
            value = float(loss.detach())
            found[name] = value, filled[: len(weights)], filled[len(weights) :]
        return found

    def _refuse_if(self, wrong: Sequence[tuple[str, str]], *, drawn: bool) -> None:
        """Refuse the problem, in all processes, if something is wrong in one."""
        if not self._group.any([bool(wrong)])[0]:
            return
        what, got = wrong[0] if wrong else ("a loss", "another one in another process")
        raise not_shareable(what, self.problem.model, drawn=drawn, got=got)


def _require_graphs(config: MetaConfig) -> None:
    """Refuse ways to products other than by the graph of a gradient: they would not be summed.

    Raises:
        UsageError: If the configuration asks for one.
    """
    flat = config.to_flat()
    for name, shared in _SHARED.items():
        if flat.get(name, shared) != shared:
            raise UsageError(
                f"{name} must be left as it is where several processes share a trial: take a "
                f"smaller batch, {ONE_PROCESS}, got {name}={flat[name]!r}"
            )


def _drawn(device: torch.device) -> Tensor:
    """Return the state of PyTorch's generators, by which it is seen whether something draws."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
