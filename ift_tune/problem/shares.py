"""Shares of a batch: what each of a trial's processes computes its part of a loss from.

A loss that is a mean over examples is the mean of its shares' losses, weighted by their sizes.
Whether a loss is one, nobody can tell by looking at it: so it is compared with that of the whole
batch, derivatives too, before a trial begins, and its value again in each outer step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ift_tune.base.errors import UsageError
from ift_tune.implicit.process_group import ProcessGroup
from ift_tune.problem.batches import Batch, map_batch
from ift_tune.problem.cutting import count_rows, shares_of, slice_of

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
    if alien := _first_alien(batch):
        raise _not_cut(alien)
    rows, rank = count_rows(batch, _not_cut), group.rank
    bounds = [(rows * r // group.size, rows * (r + 1) // group.size) for r in range(group.size)]
    pieces = [slice_of(batch, low, high) if low < high else None for low, high in bounds]
    shares, own = shares_of(problem, pieces), pieces[rank]
    # What counts for nothing must be a number all the same, and a mean over nothing is none.
    counts = own is not None and (isinstance(shares, Tensor) or shares[rank] != 0)
    return (own if counts else batch), shares[rank]


def _first_alien(batch: Batch) -> str | None:
    """Return the kind of what a batch holds beside tensors, which may have a part for each row."""
    found: list[str] = []

    def look(value: Any) -> Any:
        if not isinstance(value, _PLAIN):
            found.append(f"a {type(value).__name__}")
        return value

    map_batch(lambda tensor: tensor, batch, look)
    return found[0] if found else None


def _not_cut(got: str) -> UsageError:
    return UsageError(
        "a batch that several processes share must hold tensors with a row for each example: let "
        f"the loader give such batches, {ONE_PROCESS}; got {got}"
    )


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
