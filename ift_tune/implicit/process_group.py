"""Sums over the processes that share a trial: what autograd gives on a share becomes the whole.

Each process holds the same weights and λ and takes its share of the examples of a batch, weighted
so that the losses of all shares add up to the loss of the batch. Derivatives are linear in the
loss: gradients, products with the Hessian and mixed products add up likewise. So what leaves
autograd is summed, in the few places where it leaves, and everything after that (solves,
optimisers, decisions) is the same arithmetic on the same numbers in every process.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ift_tune.base.errors import WorkerError

_MEETING = datetime.timedelta(minutes=2)
# A process that has died closes its connections, which ends a sum at once. One that is slow, as
# the leader in a callback, is waited for.
_PATIENCE = datetime.timedelta(days=7)


class ProcessGroup:
    """The processes of a trial, on one machine.

    By Gloo, on the CPU, wherever the weights are: over the loopback interface alone, and beside any
    process group of the user's own. Its sums have the same bits in every process.

    Attributes:
        rank: Of this process; 0 leads.
        size: How many there are.
    """

    def __init__(self, store: str | os.PathLike[str], rank: int, size: int) -> None:
        """Meet the other processes.

        Args:
            store: A file that all can reach, by which they find each other.
            rank: Of this process.
            size: How many there are.
        """
        self.rank: Final = rank
        self.size: Final = size
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        loopback = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        options._devices, options._timeout = [loopback], _MEETING
        file = dist.FileStore(os.fspath(store), size)  # type: ignore[attr-defined]
        self._gloo: Any = dist.ProcessGroupGloo(file, rank, size, options)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let losses be those of shares inside, and what autograd gives the sums over them."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def sum(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sums over all processes; None where no process has anything.

        Args:
            tensors: Of this process.
            like: Tensors of their shapes, for those that it lacks.
        """
        # One message for all: the time of a small one is that of any other.
        held = [torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)]
        kind = torch.float64 if any(t.dtype == torch.float64 for t in held) else torch.float32
        mine = torch.tensor([t is not None for t in tensors], dtype=kind)
        flat = torch.cat([t.detach().to(kind).reshape(-1) for t in held])
        whole = self._reduced(torch.cat([mine, flat.cpu()]), dist.ReduceOp.SUM)
        sums = torch.split(whole[len(mine) :].to(flat.device), [t.numel() for t in held])
        return [
            s.view(t.shape).to(t.dtype) if known else None
            for s, t, known in zip(sums, held, whole[: len(mine)].tolist(), strict=True)
        ]

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """Return for each flag whether it is set in some process."""
        mine = torch.tensor([int(flag) for flag in flags])
        return [bool(n) for n in self._reduced(mine, dist.ReduceOp.SUM).tolist()]

    def differing(self, numbers: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the integers that are not the same in all processes."""
        mine = torch.stack([number.to("cpu", torch.int64) for number in numbers.values()])
        # The largest of ~n is that of the smallest n: both ends in one message.
        ends = self._reduced(torch.stack([mine, ~mine]), dist.ReduceOp.MAX)
        return [n for n, high, low in zip(numbers, ends[0], ~ends[1], strict=True) if high != low]

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = how, _PATIENCE
        tensor = tensor.contiguous()
        try:
            self._gloo.allreduce([tensor], options).wait()
        except RuntimeError as error:
            raise LostProcessError("another process of this trial has gone") from error
        return tensor


class LostProcessError(WorkerError):
    """A sum could not be taken, for another process of the trial has failed or died."""


_active: ContextVar[ProcessGroup | None] = ContextVar("process_group", default=None)


def active_group() -> ProcessGroup | None:
    """Return the processes that share the present losses; None where a loss is whole."""
    return _active.get()


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Let losses be whole inside, in each process."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def summed(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return what autograd gave for a loss, given what it gave for this process's share of it.

    Args:
        tensors: Derivatives, None where nothing is reached; as they are where the loss is whole.
        like: Tensors of their shapes.
    """
    group = active_group()
    return tuple(tensors if group is None else group.sum(tensors, like))


def sum_gradients_(weights: Sequence[Tensor]) -> None:
    """Put the sums over all processes in the place of what ``loss.backward()`` has left."""
    group = active_group()
    if group is not None:
        found = group.sum([w.grad for w in weights], weights)
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set in some process that shares the loss."""
    group = active_group()
    return list(flags) if group is None else group.any(flags)


def total(part: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of a scalar over all processes, with the derivatives of this one's part.

    The derivatives are summed later, with all others.
    """
    found: Tensor = _Total.apply(part, group)  # type: ignore[no-untyped-call]
    return found


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Any:
        return group.sum([part], [part])[0]

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return slopes[0], None


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return an integer, on the tensors' device, that any change of a bit is likely to change."""
    sums = [
        _bits(tensor).sum(dtype=torch.int64) * (2 * place + 1)
        for place, tensor in enumerate(tensors)
    ]
    return (
        torch.stack([s.to(sums[0].device) for s in sums]).sum()
        if sums
        else torch.zeros((), dtype=torch.int64)
    )


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kind = _INTEGERS[tensor.element_size()]
    return tensor.contiguous().view(kind) if tensor.numel() else tensor.new_zeros(0, dtype=kind)
