"""A batch in parts: how it is cut, and whether the parts' losses make up that of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.problem.batches import Batch, map_batch
from ift_tune.problem.passes import Part
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size


@dataclass(frozen=True)
class MicroBatch:
    """How many examples of a batch are taken at once; None for all.

    Attributes:
        train: Of the training batch of an outer step.
        val: Of the validation batch.
    """

    train: int | None = None
    val: int | None = None


def rows_of(batch: Batch) -> int:
    """Return the length that all tensors of a batch have in common, by which it can be cut.

    Raises:
        UsageError: If there is none.
    """
    lengths: set[int | None] = set()

    def look(tensor: Tensor) -> Tensor:
        lengths.add(tensor.size(0) if tensor.ndim else None)
        return tensor

    map_batch(look, batch)
    if len(lengths) != 1 or None in lengths:
        found = " and ".join(sorted(map(str, lengths))) or "no tensors"
        raise UsageError(
            "a batch can be cut into micro-batches only if its tensors have the same first "
            "dimension, the examples: let the loaders of the outer step (Splits.curvature, val) "
            f"give smaller batches instead of memory_budget, got first dimensions of {found}"
        )
    return lengths.pop() or 0


def slice_of(batch: Batch, start: int, stop: int) -> Batch:
    """Return some examples of a batch: views, no copies."""
    return map_batch(lambda tensor: tensor[start:stop], batch)


def parts_of(problem: BilevelProblem, batch: Batch, size: int | None) -> list[Part]:
    """Cut a batch into parts of at most `size` examples, as equal as they can be.

    The share of each is by `BilevelProblem.batch_size`, which says what the losses are means over.

    Raises:
        UsageError: If it cannot be cut.
    """
    if size is None:
        return [Part(batch, 1.0)]
    rows = rows_of(batch)
    if rows <= size:
        return [Part(batch, 1.0)]
    number = math.ceil(rows / size)
    bounds = [i * rows // number for i in range(number + 1)]
    pieces = [slice_of(batch, a, b) for a, b in pairwise(bounds)]
    counts = [float(as_size(problem.batch_size(piece))) for piece in pieces]
    total = sum(counts)
    if not total:
        return [Part(batch, 1.0)]  # a mean over nothing, whichever way it is taken
    return [Part(p, c / total) for p, c in zip(pieces, counts, strict=True) if c]
