"""Shares of a batch: what each of a trial's processes computes its part of a loss from.

A loss that is a mean over examples is the mean of its shares' losses, weighted by their sizes.
Whether a loss is one, nobody can tell by looking at it: so it is compared with that of the whole
batch, derivatives too, before a trial begins, and its value again in each outer step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.rnn import PackedSequence

from ift_tune.base.errors import UsageError
from ift_tune.implicit.process_group import ProcessGroup
from ift_tune.problem.batches import Batch, map_batch, named_parts
from ift_tune.problem.sizes import as_size

_PLAIN = (bool, int, float, type(None))  # of a batch as a whole, such as an epoch's number
ONE_PROCESS = "or leave out processes_per_trial (gpus_per_trial above 1)"


def share_of(problem: Any, batch: Batch, group: ProcessGroup) -> tuple[Batch, float | Tensor]:
    """Return this process's share of a batch, and its weight among all shares.

    Args:
        problem: Whose `loss_size` says what its losses are means over.
        batch: The whole, which all processes have.
        group: They.

    Raises:
        UsageError: If the batch cannot be cut into examples.
    """
    rows, rank = _count_rows(batch), group.rank
    ends = [rows * r // group.size for r in range(group.size + 1)]
    bounds = list(pairwise(ends))
    shares = [_cut(batch, rows, *bound) for bound in bounds]
    sizes = [
        problem.loss_size(share) if low < high else 0
        for share, (low, high) in zip(shares, bounds, strict=True)
    ]
    weight: float | Tensor
    if any(isinstance(size, Tensor) for size in sizes):
        # Counted on the device, and not read; in double precision, for the weights have to add up.
        device = next(size.device for size in sizes if isinstance(size, Tensor))
        counts = [torch.as_tensor(s, dtype=torch.float64, device=device) for s in sizes]
        weight = counts[rank] / torch.stack(counts).sum().clamp(min=1.0)
        nothing = ends[rank] == ends[rank + 1]
    else:
        numbers = [as_size(size) for size in sizes]
        weight = numbers[rank] / (sum(numbers) or 1)
        nothing = weight == 0
    # What counts for nothing must be a number all the same, and a mean over nothing is none.
    return (batch if nothing else shares[rank]), weight


def _count_rows(batch: Batch) -> int:
    """Return the number of examples that all tensors of a batch have a row for.

    Raises:
        UsageError: If there is none.
    """
    found: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            raise _not_cut(f"a tensor of layout {tensor.layout}")
        if tensor.ndim:
            found.add(tensor.shape[0])
        return tensor

    def refuse(value: Any) -> Any:
        if not isinstance(value, _PLAIN):
            raise _not_cut(f"a {type(value).__name__}")
        return value

    if _holds_packed(batch):  # whose rows are of several examples
        raise _not_cut("a PackedSequence")
    map_batch(note, batch, refuse)
    if len(found) != 1:
        sizes = " and ".join(map(str, sorted(found))) or "none"
        raise _not_cut(f"tensors with {sizes} rows")
    return found.pop()


def _holds_packed(batch: Batch) -> bool:
    if isinstance(batch, PackedSequence):
        return True
    parts = batch if isinstance(batch, list | tuple) else (named_parts(batch) or {}).values()
    return any(map(_holds_packed, parts))


def _not_cut(got: str) -> UsageError:
    return UsageError(
        "a batch that several processes share must hold tensors with a row for each example: let "
        f"the loader give such batches, {ONE_PROCESS}; got {got}"
    )


def _cut(batch: Batch, rows: int, low: int, high: int) -> Batch:
    whole = low == 0 and high == rows
    return batch if whole else map_batch(lambda t: t[low:high] if t.ndim else t, batch)


def not_shareable(what: str, model: nn.Module, *, drawn: bool, got: str) -> UsageError:
    """Return what to raise where a loss is not the mean of its shares' losses.

    Args:
        what: Which loss, or which derivative of it.
        model: The problem's.
        drawn: Whether random numbers were drawn.
        got: What was found.
    """
    training = [
        (f"{type(m).__name__} {name!r}", m) for name, m in model.named_modules() if m.training
    ]
    normalises = [
        name
        for name, module in training
        if isinstance(module, _NormBase) and not isinstance(module, _InstanceNorm)
    ]
    draws = [name for name, module in training if isinstance(module, _DropoutNd)]
    if normalises:
        why = (
            f"{normalises[0]} normalises over the batch, so put GroupNorm or LayerNorm in its "
            "place, or keep it in evaluation mode"
        )
    elif drawn:
        where = f"{draws[0]} draws" if draws else "it draws"
        why = f"{where} random numbers, which would be others for shares, so leave it out"
    else:
        why = (
            "take means over examples, without sums, norms or ranks over a batch, or let "
            "batch_size(batch) say what the means are over"
        )
    return UsageError(
        f"{what} must be a mean over examples for several processes to share it: {why}, "
        f"{ONE_PROCESS}; got {got}"
    )
