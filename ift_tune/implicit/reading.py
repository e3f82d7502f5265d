"""Numbers that are still on a device, and what is made of them once they are read.

To read a number is to wait for all that the device has yet to do. So whoever needs one says what it
would make of it, and all are read together, once, when there is no going on without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ift_tune.implicit.vectors import Tensors, is_stacked

T = TypeVar("T")


@dataclass(frozen=True)
class Later(Generic[T]):
    """Something that is made of numbers which have not been read.

    Attributes:
        tensors: What holds the numbers, each of any shape.
        make: Of all their entries, in order.

    Example:
        >>> import torch
        >>> from ift_tune.implicit.reading import Later, read
        >>> half = Later([torch.tensor(3.0)], lambda numbers: numbers[0] / 2)
        >>> read(half, half.then(lambda value: value > 1))
        [1.5, True]
    """

    tensors: Sequence[Tensor]
    make: Callable[[list[float]], T]

    @staticmethod
    def known(value: T) -> Later[T]:
        """Return something that is made already."""
        return Later((), lambda _: value)

    def then(self, change: Callable[[T], Any]) -> Later[Any]:
        """Return what will be made of this."""
        return Later(self.tensors, lambda numbers: change(self.make(numbers)))

    def read(self) -> T:
        """Wait for the numbers, and make it."""
        (made,) = read(self)
        found: T = made
        return found


def read(*laters: Later[Any]) -> list[Any]:
    """Return what is made of all numbers, which are waited for once."""
    both = together(*laters)
    return both.make(_numbers(both.tensors))


def together(*laters: Later[Any]) -> Later[list[Any]]:
    """Return what is made of each, as one."""
    sizes = [sum(t.numel() for t in later.tensors) for later in laters]

    def make(numbers: list[float]) -> list[Any]:
        rest = iter(numbers)
        parts = [list(islice(rest, size)) for size in sizes]
        return [later.make(part) for later, part in zip(laters, parts, strict=True)]

    return Later([t for later in laters for t in later.tensors], make)


@torch.no_grad()
def _numbers(tensors: Tensors) -> list[float]:
    """Return all entries in order; what stands for several numbers remains a tensor."""
    carried = iter(_carried([t for t in tensors if not (t.is_cpu or is_stacked(t))]))
    found: list[float] = []
    for tensor in tensors:
        if is_stacked(tensor):  # of several trials at once, whose arithmetic is done on all of them
            found += tensor.reshape(-1).double().unbind()  # type: ignore[arg-type]
        elif tensor.is_cpu:
            found += map(float, tensor.reshape(-1).tolist())
        else:
            found += [next(carried) for _ in range(tensor.numel())]
    return found


def _carried(tensors: Tensors) -> list[float]:
    """Return the entries of tensors on a device: packed there, and carried in one copy."""
    if len(tensors) == 1 and tensors[0].numel() == 1:
        return [float(tensors[0])]
    if not tensors:
        return []
    # Whole numbers and truth values by themselves: float32, which others are in, would round them.
    parts = [t if t.is_floating_point() else t.double() for t in tensors]
    if all(part.ndim == 0 for part in parts):
        packed = torch.stack(parts)
    else:
        packed = torch.cat([part.reshape(-1) for part in parts])
    numbers: list[float] = packed.double().cpu().tolist()
    return numbers


def choose(flag: Tensor, chosen: Tensors, other: Tensors) -> Tensors:
    """Return `chosen` where the flag, of one entry, is set, and else `other`.

    On the CPU a look costs nothing. On a device both must be there, and no one looks.
    """
    if flag.is_cpu:
        return chosen if bool(flag) else other
    return [torch.where(flag, x, y) for x, y in zip(chosen, other, strict=True)]


def choose_or_zero(flag: Tensor, chosen: Tensors) -> Tensors | None:
    """Return `chosen` where the flag is set, and else nothing: None on the CPU, zeros elsewhere."""
    if flag.is_cpu:
        return chosen if bool(flag) else None
    zeros = {x.dtype: x.new_zeros(()) for x in chosen}
    return [torch.where(flag, x, zeros[x.dtype]) for x in chosen]
