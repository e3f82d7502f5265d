"""What a kind's network is given of a batch: the one tensor, in the network's own precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ift_tune.problem.batches import map_batch, tensors_of
from ift_tune.problem.modes import evaluating

_NODES = 16


def sole_input(inputs: Any) -> Any:
    """Return the tensor, of inputs by name that are one tensor; others as they are."""
    if isinstance(inputs, Mapping) and len(inputs) == 1:
        (only,) = inputs.values()
        return only if isinstance(only, Tensor) else inputs
    return inputs


def in_precision_of(module: nn.Module, seen: Any) -> Any:
    """Return what a module is to see, its real numbers in the type of the module's first weights.

    Of a tensor, or of several by name; whole numbers stay. A table made from a NumPy array is in
    double precision, and so is all data in a check of the hypergradient; modules refuse both.
    """
    own = (p.dtype for p in module.parameters() if p.is_floating_point())
    return _in(next(own, None), seen)


def _in(dtype: torch.dtype | None, seen: Any) -> Any:
    """Return values with their real numbers in a type; None: as they are."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return seen if dtype is None else map_batch(cast, seen)


def quadrature(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gauss and Legendre's nodes in (0, 1), and their shares, which sum to 1.

    At these times its loss a scorer sees an example, whose training loss is an integral.
    """
    nodes, shares = np.polynomial.legendre.leggauss(_NODES)
    return losses.new_tensor((nodes + 1.0) / 2.0), losses.new_tensor(shares / 2.0)


@torch.no_grad()
def features_of(
    encoder: Callable[[Any], Tensor], inputs: Any, device: torch.device, made_in: torch.dtype
) -> Tensor:
    """Return the features of inputs, by an encoder as it was trained, or by any function.

    Args:
        encoder: A module, which is given its own precision; or a function.
        inputs: The examples'.
        device: Where a module is moved to.
        made_in: The precision to give a function if it fails on that of the inputs: its constants
            are in another where a check has put the problem into double precision.
    """
    if isinstance(encoder, nn.Module):
        with evaluating(encoder.to(device)):
            features: Tensor = encoder(in_precision_of(encoder, inputs))
            return features
    try:
        return encoder(inputs)
    except RuntimeError:
        if {t.dtype for t in tensors_of(inputs) if t.is_floating_point()} <= {made_in}:
            raise
        return encoder(_in(made_in, inputs))
