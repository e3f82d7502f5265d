"""Steps of the weights of several members at once, each at its own learning rate."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, optim

from ift_tune.joint.optimizers import Descent
from ift_tune.joint.packed.columns import Columns, write_back


class PackedDescent(abc.ABC):
    """The inner optimisers of several members as one, whose rows are theirs.

    Their state is read from their optimisers and written back to them, so that these could take
    the next step as well.
    """

    buffers: ClassVar[tuple[str, ...]]
    """The names, in the optimisers' states, of what is of the shapes of the weights."""

    def __init__(self, descents: Sequence[Descent], columns: Columns, steps: Sequence[int]) -> None:
        """Read the states.

        Args:
            descents: Of the members.
            columns: Where the weights lie in a row.
            steps: How many each has taken.
        """
        self._descents, self._columns, self._steps = list(descents), columns, list(steps)
        self.group: dict[str, Any] = descents[0].optimizer.param_groups[0]
        for descent in descents:
            for tensor in descent.tensors:
                if not descent.optimizer.state.get(tensor):
                    self._begin(descent.optimizer.state, tensor)
        self._state = {
            name: columns.join([self._of(d, name) for d in descents]) for name in self.buffers
        }

    def _begin(self, states: dict[Any, Any], tensor: Tensor) -> None:
        """Make the state with which the optimiser begins."""
        states[tensor] = {
            name: torch.zeros_like(tensor, memory_format=torch.preserve_format)
            for name in self.buffers
        }

    @staticmethod
    def _of(descent: Descent, name: str) -> list[Tensor]:
        return [descent.optimizer.state[t][name] for t in descent.tensors]

    def rates(self, lrs: Sequence[Sequence[float]], like: Tensor) -> Tensor:
        """Return what the steps need of the learning rates, shape (steps, P, ...).

        Args:
            lrs: Of each member, one for each step.
            like: On the device and of the type that is wanted.
        """
        return torch.tensor(lrs, dtype=torch.float64).T.to(like)

    @abc.abstractmethod
    def step(self, weights: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """Move the first rows of the weights.

        Args:
            weights: Those rows, changed in place.
            gradient: Of the same shape; may be used up.
            rates: Of these rows, from `rates`.
        """

    def close(self, taken: Sequence[int]) -> None:
        """Write the states back.

        Args:
            taken: The steps of each member.
        """
        for name, matrix in self._state.items():
            targets = [self._of(d, name) for d in self._descents]
            write_back(targets, self._columns.rows(matrix))
        counters = [
            (d.optimizer.state[t]["step"], float(n))
            for d, n in zip(self._descents, taken, strict=True)
            for t in d.tensors
            if "step" in d.optimizer.state[t]
        ]
        if counters:
            torch._foreach_add_([c for c, _ in counters], [n for _, n in counters])


class PackedSGD(PackedDescent):
    """Gradient descent, with or without momentum."""

    buffers: ClassVar[tuple[str, ...]] = ()

    def _begin(self, states: dict[Any, Any], tensor: Tensor) -> None:
        """Make nothing: it has none."""

    def step(self, weights: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """Move the weights along their gradients."""
        weights.addcmul_(gradient, rates.unsqueeze(1), value=-1.0)


class PackedMomentum(PackedDescent):
    """Gradient descent with momentum."""

    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def step(self, weights: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """Move the weights along the mean of their gradients."""
        mean = self._state["momentum_buffer"][: len(weights)]
        # From a buffer of zeros, which gives the first gradient, as the optimiser's own first step.
        mean.mul_(self.group["momentum"]).add_(gradient)
        weights.addcmul_(mean, rates.unsqueeze(1), value=-1.0)


class PackedAdam(PackedDescent):
    """Adam, each row with its own bias correction."""

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, descents: Sequence[Descent], columns: Columns, steps: Sequence[int]) -> None:
        """Read the states; see `PackedDescent`."""
        super().__init__(descents, columns, steps)
        mean = self._state["exp_avg"]
        self._moves = torch.zeros_like(mean)
        self._counts: Iterator[Tensor] = iter(())

    def _begin(self, states: dict[Any, Any], tensor: Tensor) -> None:
        """Add the counter, as the fused optimiser has it."""
        super()._begin(states, tensor)
        states[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            **states[tensor],
        }

    def rates(self, lrs: Sequence[Sequence[float]], like: Tensor) -> Tensor:
        """Return the learning rates, shape (steps, P); the counters of these steps are kept."""
        counts = [[taken + n + 1 for taken in self._steps] for n in range(len(lrs[0]))]
        self._counts = iter(torch.tensor(counts, dtype=torch.float32).to(like.device))
        return super().rates(lrs, like)

    def step(self, weights: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """Move the weights."""
        rows = len(weights)
        moves = self._moves[:rows].zero_()
        mean, square = self._state["exp_avg"][:rows], self._state["exp_avg_sq"][:rows]
        first, second = self.group["betas"]
        # With a rate of 1, for a kernel has one for all rows.
        torch._fused_adam_(
            list(moves),
            list(gradient),
            list(mean),
            list(square),
            [],
            list(next(self._counts)[:rows]),
            lr=1.0,
            beta1=first,
            beta2=second,
            weight_decay=0.0,
            eps=self.group["eps"],
            amsgrad=False,
            maximize=False,
        )
        weights.addcmul_(moves, rates.unsqueeze(1))


def kind_of(optimizer: optim.Optimizer) -> type[PackedDescent] | None:
    """Return what takes the steps of such optimisers at once; None if nothing does."""
    group = optimizer.param_groups[0]
    plain = not (group.get("maximize") or group.get("amsgrad") or group.get("weight_decay"))
    if not plain or len(optimizer.param_groups) > 1:
        return None
    if type(optimizer) is optim.Adam:
        return PackedAdam
    if type(optimizer) is optim.SGD and not (group["nesterov"] or group["dampening"]):
        return PackedMomentum if group["momentum"] else PackedSGD
    return None
