"""The penalty of a problem's kind of hyperparameters, unless its training loss holds it already."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.penalty import Penalty, SumPenalty
from ift_tune.implicit.vectors import Tensors, flatten, norm
from ift_tune.problem.batches import map_batch, to_device
from ift_tune.problem.loaders import first_batch
from ift_tune.problem.modes import preserved_buffers
from ift_tune.problem.returned import as_loss

_ALIKE = 1e-3


def own_penalty(problem: Any) -> Penalty | None:
    """Return what a problem's hyperparameters give in closed form, at their present values.

    A training loss that adds a part of it by hand, as ``loss + self.hyper()`` does, is left its own
    way: that part is not counted twice. It is told from the training loss of one batch, at the
    first call: λ of a decay reaches a training loss by nothing else.

    Args:
        problem: With a model, hyperparameters, splits and a training loss.

    Raises:
        UsageError: If the training loss uses such a λ in some other way.
    """
    say = getattr(getattr(problem, "hyper", None), "penalty", None)
    if not callable(say) or not _takes_nothing(say):
        return None  # something of the user's own of this name
    found = say()
    if not isinstance(found, Penalty):
        return None
    parts = _parts(found)
    by_hand = _by_hand(problem, parts)
    kept = [part for number, part in enumerate(parts) if number not in by_hand]
    if len(kept) == len(parts):
        return found
    return SumPenalty(kept) if kept else None


def _takes_nothing(method: Any) -> bool:
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return False
    return True


def _parts(penalty: Penalty) -> list[Penalty]:
    if isinstance(penalty, SumPenalty):
        return [inner for part in penalty.parts for inner in _parts(part)]
    return [penalty]


def _by_hand(problem: Any, parts: list[Penalty]) -> frozenset[int]:
    """Return the numbers of the parts that the training loss holds; looked at once."""
    known: tuple[Any, frozenset[int]] | None = vars(problem).get("_penalty_by_hand")
    if known is None or known[0] is not problem.hyper:
        known = problem.hyper, _look(problem, parts)
        problem._penalty_by_hand = known
    return known[1]


def _look(problem: Any, parts: list[Penalty]) -> frozenset[int]:
    hypers = [h for part in parts for h in part.hypers]
    found = set()
    with _differentiable(hypers):
        slopes = _slopes(problem, hypers)
        for number, part in enumerate(parts):
            own = [slopes[id(h)] for h in part.hypers]
            if all(slope is None for slope in own):
                continue
            if not _is_part(part, own, problem.weights()):
                raise UsageError(
                    "the training loss must leave the hyperparameters of a closed-form penalty to "
                    "the penalty, or add its value as it is: say what is meant by a method "
                    "penalty(self) of the problem, that returns self.hyper.penalty() or None; got "
                    "a loss that depends on them in another way"
                )
            found.add(number)
    return frozenset(found)


@contextlib.contextmanager
def _differentiable(tensors: Tensors) -> Iterator[None]:
    """Let graphs to leaf tensors be built, wherever this is called from."""
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)


def _slopes(problem: Any, hypers: Tensors) -> dict[int, Tensor | None]:
    """Return the derivative of one batch's training loss by each of the hyperparameters."""
    device, again = hypers[0].device, copy.copy(problem)  # what it counts is not counted
    with RandomStream(0, device).aside(), preserved_buffers(problem.model):
        batch = to_device(first_batch("train", problem.splits.train), device)
        if all(w.dtype is torch.float64 for w in problem.weights()):  # a copy in the check
            batch = map_batch(lambda t: t.double() if t.is_floating_point() else t, batch)
        loss = as_loss(again.train_loss(batch), "train_loss", graph=False)
        if not loss.requires_grad:
            return dict.fromkeys(map(id, hypers))
        found = torch.autograd.grad(loss, list(hypers), allow_unused=True)
    return {id(h): slope for h, slope in zip(hypers, found, strict=True)}


def _is_part(part: Penalty, own: list[Tensor | None], weights: Tensors) -> bool:
    """Return whether a loss with these derivatives holds the penalty, or a multiple of it."""
    value = part.aligned(weights).value(weights)
    slopes = torch.autograd.grad(value, part.hypers, allow_unused=True)
    wanted = flatten([_filled(s, h) for s, h in zip(slopes, part.hypers, strict=True)])
    found = flatten([_filled(s, h) for s, h in zip(own, part.hypers, strict=True)])
    scale = wanted.dot(found) / wanted.dot(wanted).clamp(min=torch.finfo(wanted.dtype).tiny)
    if wanted.numel() == 1:
        scale = torch.ones_like(scale)  # any one number is a multiple of another
    return bool(norm([found - scale * wanted]) <= _ALIKE * norm([found]))


def _filled(slope: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if slope is None else slope.detach()
