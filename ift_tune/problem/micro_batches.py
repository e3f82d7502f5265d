"""A batch in parts: how it is cut, and whether the parts' losses make up that of the whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState, derive_seed, drawn_again
from ift_tune.implicit.checkpoints import repeated_as_called
from ift_tune.implicit.differences import coarsest_rounding
from ift_tune.implicit.micro_batches import accumulate_
from ift_tune.implicit.vectors import Tensors, fill_missing, relative_error
from ift_tune.problem.batches import Batch
from ift_tune.problem.cutting import count_rows, pieces_of, shares_of, slice_of
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.passes import Part
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_loss

_log = logging.getLogger(__name__)
_ALIKE = 10.0  # times rounding to the power of 2/3: sums in another order, and no more


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
    """Return the number of rows that all tensors of a batch have, by which it can be cut.

    Raises:
        UsageError: If they differ in it.
    """
    return count_rows(batch, _not_cut)


def _not_cut(got: str) -> UsageError:
    return UsageError(
        "a batch can be cut into micro-batches only if its tensors have a row for each example: "
        "let the loaders of the outer step (Splits.curvature, val) give smaller batches instead of "
        f"memory_budget, and leave signal_every out, got {got}"
    )


def parts_of(problem: BilevelProblem, batch: Batch, size: int | None) -> list[Part]:
    """Cut a batch into parts of at most `size` examples, as equal as they can be.

    The share of each is by `BilevelProblem.loss_size`, which says what the losses are means over.

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
    shares = shares_of(problem, pieces)
    if isinstance(shares, Tensor):
        shares = shares.tolist()
    if not any(shares):
        return [Part(batch, 1.0)]  # a mean over nothing, whichever way it is taken
    return [Part(p, share) for p, share in zip(pieces, shares, strict=True) if share]


def random_parts(batch: Batch, number: int, seed: int) -> list[Batch]:
    """Cut a batch into parts of about as many examples, drawn at random, each in one of them.

    Not in its order: where that is by class, parts would differ by more than chance.

    Args:
        batch: With tensors of one first dimension, the examples.
        number: Of parts; as many as examples, where these are fewer.
        seed: Of their order.

    Raises:
        UsageError: If it cannot be cut.
    """
    size = rows_of(batch)
    number = min(number, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return pieces_of(batch, order, [i * size // number for i in range(number + 1)])


def is_additive(
    problem: BilevelProblem, batch: Batch, loss: Callable[[Batch], Tensor], size: int
) -> bool:
    """Return whether a loss of a batch is the mean of the losses of its parts, with its gradient.

    Not so where examples are coupled, as by batch normalisation in training or by a sum that the
    loss divides by. Looked at on some examples, against their halves, so that no more than one
    part is ever in memory: on some that are drawn, for the first may be all alike.

    Args:
        problem: At its present weights and λ.
        batch: With two examples or more.
        loss: Its training or validation loss, in the mode that it has in an outer step.
        size: Of a part.
    """
    examples, device = rows_of(batch), problem.weights()[0].device
    rows = min(examples, max(2, size))
    generator = torch.Generator().manual_seed(derive_seed("is_additive"))
    (some,) = pieces_of(batch, torch.randperm(examples, generator=generator), [0, rows])
    state = GlobalState(device)

    def slopes(parts: Sequence[Part]) -> tuple[Tensors, bool, float]:
        inputs = [*problem.weights(), *problem.hypers()]
        total: list[Tensor | None] = [None] * len(inputs)
        value, rounding = torch.zeros((), device=device), 0.0
        again = repeated_as_called(problem.model, problem.hyper)
        with drawn_again(state, device), preserved_buffers(problem.model), again:
            before = GlobalState(device)
            for part, share in parts:
                found = share * as_loss(loss(part), "a loss")
                rounding = max(rounding, coarsest_rounding(found, problem.weights()))
                value = value.to(found) + found.detach()
                accumulate_(total, torch.autograd.grad(found, inputs, allow_unused=True))
            drawn = not before.same(GlobalState(device))
        return [value, *fill_missing(tuple(total), inputs)], drawn, rounding

    whole, drawn, rounding = slopes([Part(some, 1.0)])
    halves = parts_of(problem, some, (rows + 1) // 2)
    if drawn:
        # Masks of parts are others than that of the whole. What draws by its mode is switched off,
        # but no normalisation, whose mode is what couples examples.
        with _undisturbed(problem):
            whole, drawn, rounding = slopes([Part(some, 1.0)])
            parts, _, _ = slopes(halves)
        if drawn:
            _log.warning(
                "a loss draws random numbers whatever its mode, so that micro-batches cannot be "
                "compared with the whole batch: it is taken to be a mean over examples"
            )
            return True
    else:
        parts, _, _ = slopes(halves)
    allowed = min(_ALIKE * rounding ** (2.0 / 3.0), 0.03)
    sizes = [len(problem.weights()) + 1]
    groups = [slice(0, 1), slice(1, sizes[0]), slice(sizes[0], None)]
    return all(relative_error(parts[g], whole[g]) <= allowed for g in groups if whole[g])


@contextmanager
def _undisturbed(problem: BilevelProblem) -> Iterator[None]:
    """Put all but normalisations in evaluation mode."""
    kept = [m for m in problem.model.modules() if isinstance(m, _NormBase) and m.training]
    with evaluating(problem.model), evaluating(problem.hyper):
        for module in kept:
            module.training = True
        yield
