"""Passes that are begun again: whether they have the same batches, and what to say if not."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, drawn_again
from ift_tune.problem.batches import Batch, Loader, tensors_of
from ift_tune.problem.loader_parts import Sources, noting, places_of

_COMPARED = 1000  # about so many values of a batch tell it from others


REPEATABLE = (
    "let iter() start a pass at its first batch, in an order drawn from a torch.Generator that the "
    "loader, its sampler or its data set has as an attribute, from PyTorch's, NumPy's or Python's "
    "global numbers, or by a whole number that the sampler has as an attribute, such as its epoch"
)
"""What a loader has to do so that a pass over it can be begun again."""


class OtherBatchesError(UsageError):
    """A loader gives other batches when a pass over it is begun again."""


def other_batches(name: str) -> OtherBatchesError:
    """Return what to raise of the loader of a split."""
    return OtherBatchesError(
        f"the {name} loader gives other batches when its pass is begun again, so it can neither be "
        f"measured in mid-walk nor resumed: {REPEATABLE}"
    )


def begins_again(loader: Loader, device: torch.device) -> bool:
    """Return whether a pass that is begun again has the same order, as far as a sampler tells.

    A sampler begins two passes, at the same random numbers, and is left as it was; no example is
    loaded. Of what has no sampler, nothing is known before its batches are there.

    Args:
        loader: A split's.
        device: Where the random numbers are that its order may be drawn from.
    """
    noted = noting(loader)[1] if places_of(loader) else None
    if noted is None:
        return True
    state, sources, begun = GlobalState(device), Sources.of(loader), []
    for _ in range(2):
        with drawn_again(state, device), sources.left_alone():
            next(iter(noted), None)
            begun.append(noted.first())
    one, other = begun
    return one is None or other is None or _same(one, other)


def values_of(batch: Batch) -> list[Tensor]:
    """Return values from all over each tensor of a batch, to know it again by."""
    flat = [
        tensor.detach().flatten()
        for tensor in tensors_of(batch)
        if tensor.layout is torch.strided and not tensor.is_nested
    ]
    return [values[:: max(1, len(values) // _COMPARED)].cpu().clone() for values in flat]


def known_again(before: list[Tensor], now: list[Tensor]) -> bool:
    """Return whether two batches are of the same examples, as far as one can tell.

    One tensor of several values is enough: labels stay where augmentation changes the inputs.
    """
    if len(before) != len(now):
        return False
    same = [_same(one, other) for one, other in zip(before, now, strict=True)]
    return all(same) or any(
        equal and bool((values != values[0]).any())
        for values, equal in zip(before, same, strict=True)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether values are the same, up to the rounding of another machine."""
    try:
        torch.testing.assert_close(one, other, equal_nan=True)
    except AssertionError:
        return False
    return True
