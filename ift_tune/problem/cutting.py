"""A batch in pieces: how many rows it has, some of them, and what each piece's loss counts for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ift_tune.base.errors import UsageError
from ift_tune.problem.batches import Batch, map_batch, named_parts
from ift_tune.problem.contents import contents_of, note
from ift_tune.problem.sizes import as_size


def count_rows(batch: Batch, refused: Callable[[str], UsageError]) -> int:
    """Return the number of rows that all tensors of a batch have; scalars belong to all of them.

    Args:
        batch: Whatever a loader yields.
        refused: Makes the error from what was found.

    Raises:
        UsageError: If the tensors differ in it, or cannot be cut by rows.
    """
    found: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            raise refused(f"a tensor of layout {tensor.layout}")
        if tensor.ndim:
            found.add(tensor.size(0))
        return tensor

    if _holds_packed(batch):  # whose rows are of several examples
        raise refused("a PackedSequence")
    map_batch(look, batch)
    if len(found) != 1:
        raise refused(f"tensors with {' and '.join(map(str, sorted(found))) or 'none'} rows")
    return found.pop()


def slice_of(batch: Batch, low: int, high: int) -> Batch:
    """Return some rows of a batch that `count_rows` has counted: views, no copies."""
    return map_batch(lambda tensor: tensor[low:high] if tensor.ndim else tensor, batch)


def pieces_of(batch: Batch, order: Tensor, bounds: Sequence[int]) -> list[Batch]:
    """Return pieces of a batch whose rows are put into another order.

    Args:
        batch: Counted by `count_rows`.
        order: Numbers of rows, on the CPU.
        bounds: Where in the order pieces begin, and the last one ends.
    """
    carried: dict[torch.device, Tensor] = {}

    def take(chosen: slice, tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        if tensor.device not in carried:
            carried[tensor.device] = order.to(tensor.device, non_blocking=True)
        rows = torch.index_select(tensor, 0, carried[tensor.device][chosen])
        known = contents_of(tensor)  # so that nobody waits for a look at these
        return rows if known is None else note(rows, known)

    return [map_batch(partial(take, slice(a, b)), batch) for a, b in pairwise(bounds)]


def shares_of(problem: Any, pieces: Sequence[Batch | None]) -> list[float] | Tensor:
    """Return the share of each piece's loss in that of the whole batch, which is a mean.

    Args:
        problem: Whose `loss_size` says what its losses are means over.
        pieces: Of one batch; None for one without a row.

    Returns:
        Numbers; all 0 where there is nothing to count. One tensor in double precision where the
        sizes are counted on a device, which is not waited for.
    """
    sizes = [0 if piece is None else problem.loss_size(piece) for piece in pieces]
    if any(isinstance(size, Tensor) for size in sizes):
        device = next(size.device for size in sizes if isinstance(size, Tensor))
        counts = [torch.as_tensor(size, dtype=torch.float64, device=device) for size in sizes]
        shares = torch.stack(counts)
        total = shares.sum()
        return shares / torch.where(total > 0.0, total, 1.0)
    numbers = [as_size(size) for size in sizes]
    whole = sum(numbers) or 1
    return [number / whole for number in numbers]


def _holds_packed(batch: Batch) -> bool:
    if isinstance(batch, PackedSequence):
        return True
    parts = batch if isinstance(batch, list | tuple) else (named_parts(batch) or {}).values()
    return any(map(_holds_packed, parts))
