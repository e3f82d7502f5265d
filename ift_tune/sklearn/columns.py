"""Which weights the columns of the inputs enter: told by a pass, not by names or shapes alone."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.randomness import RandomStream
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.outputs import call_model

_ROWS = 4


def weights_of_columns(model: nn.Module, inputs: Tensor) -> list[str]:
    """Return the trained weights, by name, whose second dimension is the columns of the inputs.

    A weight of the right shape may as well belong to hidden units. So what its module is given in
    a pass has to be the columns, each by itself, whatever scaled them before.

    Args:
        model: Is left as it is.
        inputs: Rows (N, n_features).
    """
    rows, columns = inputs[:_ROWS].clone().requires_grad_(), inputs.shape[1]
    wide = {
        f"{name}.{own}" if name else own: module
        for name, module in model.named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.requires_grad and weight.ndim > 1 and weight.shape[1] == columns
    }
    entered: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(RandomStream(0, rows.device).aside())
        stack.enter_context(evaluating(model))
        stack.enter_context(preserved_buffers(model))
        for module in {*wide.values()}:
            note = partial(_note, rows, entered)
            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        call_model(model, rows)
    return [name for name, module in wide.items() if module in entered]


def _note(rows: Tensor, entered: set[nn.Module], module: nn.Module, args: Any, kwargs: Any) -> None:
    given = [*args, *kwargs.values()]
    if any(isinstance(value, Tensor) and _are_columns(value, rows) for value in given):
        entered.add(module)


def _are_columns(given: Tensor, rows: Tensor) -> bool:
    """Return whether each column is made of the column of the inputs alone."""
    if given.shape[:2] != rows.shape:
        return False
    if given.shape == rows.shape and torch.equal(given, rows):
        return True
    if not given.requires_grad:
        return False
    # Of every second column, weighed at random: what is of hidden units depends on others too.
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(given.shape, generator=generator, dtype=torch.float64) + 0.5
    weights[:, 1::2] = 0.0
    weights = weights.to(given)
    (slope,) = torch.autograd.grad((weights * given).sum(), rows, retain_graph=True)
    return bool(slope[:, ::2].any()) and not bool(slope[:, 1::2].any())
