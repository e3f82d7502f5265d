"""How much memory an outer step may take, and in which parts its batches keep to that."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.vectors import Tensors
from ift_tune.joint.live_bytes import measured_peak
from ift_tune.joint.optimizers import Descent
from ift_tune.problem.batches import Batch
from ift_tune.problem.cutting import slice_of
from ift_tune.problem.micro_batches import MicroBatch, is_additive, rows_of
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem

_log = logging.getLogger(__name__)

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What is raised where memory is not enough."""

_COMPARED = 8  # examples, of a whole with its halves
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def parse_bytes(name: str, value: object) -> int:
    """Return a number of bytes, given as a number or as a text: "2GB", "512 MiB".

    Raises:
        UsageError: If it is neither, or not above 0.

    Example:
        >>> from ift_tune.joint.memory import parse_bytes
        >>> parse_bytes("memory_budget", "1.5 GB"), parse_bytes("memory_budget", "2MiB")
        (1500000000, 2097152)
    """
    found: float | None = None
    if isinstance(value, str) and (parts := _SIZE.fullmatch(value)):
        number, unit, binary = parts.groups()
        power = "KMGT".find(unit.upper()) + 1 if unit else 0
        found = float(number) * (1024**power if binary else _UNITS[unit.upper()])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    if found is None or not 1.0 <= found < 2.0**62:
        raise UsageError(
            f"{name} must be a number of bytes above 0 or a text such as '2GB', got {value!r}"
        )
    return int(found)


def held_bytes(problem: BilevelProblem, inner: Descent, outer: Descent, kept: Tensors = ()) -> int:
    """Return what a trial keeps between steps: weights, λ, their optimisers, warm starts; in bytes.

    Args:
        problem: Its model and hyperparameters, with their buffers.
        inner: The weights' optimiser.
        outer: That of λ. What either will keep after its first step counts already.
        kept: Further tensors, as what one solve leaves for the next.
    """
    modules = [*problem.model.parameters(), *problem.model.buffers()]
    modules += [*problem.hyper.parameters(), *problem.hyper.buffers(), *kept]
    held = size_of(modules)
    for descent, tensors in ((inner, problem.weights()), (outer, problem.hypers())):
        states = [v for state in descent.optimizer.state.values() for v in state.values()]
        present = size_of([v for v in states if isinstance(v, Tensor)])
        held += max(present, int(_states_an_entry(descent.optimizer) * size_of(tensors)))
    return held


def size_of(tensors: Tensors) -> int:
    """Return how many bytes tensors take, each once; what is expanded takes those of its parts."""
    each = {id(t): t for t in tensors}.values()
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in each)


def _states_an_entry(optimizer: torch.optim.Optimizer) -> float:
    """Return how many numbers an optimiser keeps for each that it moves: 2 of Adam."""
    probe = torch.zeros(64, requires_grad=True)
    probe.grad = torch.ones(64)
    try:
        twin = type(optimizer)([probe], **optimizer.defaults)
        twin.step()
    except (TypeError, ValueError, RuntimeError):  # one of the user's own, with other arguments
        return 2.0
    kept = [v for v in twin.state[probe].values() if isinstance(v, Tensor) and v.numel() == 64]
    return float(len(kept))


def fit_micro_batch(
    problem: BilevelProblem,
    train_batch: Batch,
    val_batch: Batch,
    take: Callable[[Batch, Batch, MicroBatch | None], object],
    *,
    budget: int,
    held: Callable[[], int],
) -> MicroBatch | None:
    """Return the largest micro-batches with which an outer step keeps to a budget.

    The memory of an outer step is measured, on a few examples first and then on twice as many,
    until it is too much.

    Args:
        problem: At its present weights and λ.
        train_batch: Of the training loss.
        val_batch: Of the validation loss.
        take: Takes a hypergradient on two batches in parts.
        budget: In bytes.
        held: Says how many bytes are taken anyway, once something has been taken.

    Returns:
        None where whole batches fit.

    Raises:
        UsageError: If not even the smallest parts fit, or a loss couples its examples so that its
            batch cannot be cut.
    """
    device = problem.weights()[0].device
    try:
        sizes = rows_of(train_batch), rows_of(val_batch)
    except UsageError:  # it cannot be cut, and need not be where the whole has room
        if _peak(partial(take, train_batch, val_batch, None), device) + held() <= budget:
            return None
        raise
    separable = separable_losses(problem, train_batch, val_batch)
    largest = max((n for n, free in zip(sizes, separable, strict=True) if free), default=1)
    fitting: tuple[int, MicroBatch] | None = None
    rows, peak = 1, 0
    while True:
        rows = min(rows, largest)
        parts = MicroBatch(*(rows if free else None for free in separable))
        # Of two parts, so that a sum over parts is in memory too.
        one, two = (
            slice_of(batch, 0, min(2 * rows, size)) if free else batch
            for batch, size, free in zip((train_batch, val_batch), sizes, separable, strict=True)
        )
        try:
            peak = _peak(partial(take, one, two, parts), device)
        except OUT_OF_MEMORY:
            peak = max(peak, budget + 1)
        if held() + peak > budget or rows == largest:
            break
        fitting, rows = (rows, parts), 2 * rows
    if held() + peak <= budget:  # of all that can be cut
        whole = _peak(partial(take, train_batch, val_batch, None), device)
        return None if held() + whole <= budget else MicroBatch()
    if fitting is None:
        coupled = [n for n, free in zip(("train", "val"), separable, strict=True) if not free]
        why = (
            f"{' and '.join(f'{name}_loss' for name in coupled)} couples the examples of a batch "
            "(as BatchNorm in training mode does), which so cannot be cut: raise it, let the "
            "loaders of the outer step give smaller batches, or use GroupNorm"
            if coupled
            else "raise it"
        )
        raise UsageError(
            f"memory_budget is not enough for an outer step of {rows} "
            f"example{'s' * (rows > 1)} at once, which takes {held() + peak:,} bytes with the "
            f"weights, λ and their optimisers: {why}, got {budget:,}"
        )
    return fitting[1]


def separable_losses(
    problem: BilevelProblem, train_batch: Batch, val_batch: Batch
) -> tuple[bool, bool]:
    """Return whether the training and the validation loss are means over examples.

    What is not is said: its batch is taken whole.
    """

    def val_loss(batch: Batch) -> Tensor:
        with evaluating(problem.model):
            return problem.val_loss(batch)

    found = []
    for name, batch, loss in (
        ("train_loss", train_batch, problem.train_loss),
        ("val_loss", val_batch, val_loss),
    ):
        free = rows_of(batch) > 1 and is_additive(problem, batch, loss, _COMPARED)
        if not free and rows_of(batch) > 1:
            _log.warning(
                "%s is not the mean of the losses of its examples, as where BatchNorm normalises "
                "over the batch or a sum of weights is divided by: its batch is taken whole, and "
                "micro-batches are those of the other loss alone",
                name,
            )
        found.append(free)
    return found[0], found[1]


def halved(parts: MicroBatch | None, sizes: tuple[int, int], free: tuple[bool, bool]) -> MicroBatch:
    """Return micro-batches of half the size.

    Raises:
        ValueError: If they cannot be any smaller.
    """
    now = parts or MicroBatch()
    pairs = zip((now.train, now.val), sizes, free, strict=True)
    smaller = [max(1, (size or rows) // 2) if can else None for size, rows, can in pairs]
    found = MicroBatch(*smaller)
    if found == now or found == MicroBatch():
        raise ValueError("a micro-batch cannot be smaller than one example")
    return found


def _peak(action: Callable[[], object], device: torch.device) -> int:
    with measured_peak(device) as peak:
        action()
    return peak.bytes
