"""What stands in for functions of which PyTorch's second derivatives are wrong, missing or slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ift_tune.base.errors import DoubleBackwardError
from ift_tune.implicit.convolutions import CONVOLUTIONS


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g·v/‖v‖. The kernel's second derivative takes ‖v‖ for a constant."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3.0) / 6.0


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    differences = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    distances: Tensor = torch.linalg.vector_norm(differences, ord=p, dim=-1)
    return distances


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    distances: Tensor = torch.linalg.vector_norm(input[first] - input[second], ord=p, dim=-1)
    return distances


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is False or reduce is False:  # the names before `reduction`
        reduction = "none" if reduce is False else "sum"
    rows, targets = (input, target) if input.ndim > 1 else (input[None], target.reshape(1))
    own = rows.gather(1, targets[:, None])
    each = (margin - own + rows).clamp(min=0.0) ** p
    if weight is not None:
        each = each * weight[targets][:, None]
    # The right class itself does not count; its term is a constant.
    losses = each.scatter(1, targets[:, None], 0.0).sum(dim=1) / rows.shape[1]
    losses = losses if input.ndim > 1 else losses[0]
    return losses if reduction == "none" else getattr(losses, reduction)()


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _refuse("embedding", max_norm, scale_grad_by_freq)
    return F.embedding(input, weight, padding_idx)


def _torch_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return what `F.embedding` is made of."""
    _refuse("embedding", None, scale_grad_by_freq)
    return torch.embedding(weight, indices, padding_idx)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    _refuse("embedding_bag", max_norm, scale_grad_by_freq)
    if mode == "max":
        raise DoubleBackwardError(
            "the training loss uses embedding_bag with mode='max', which has no second "
            "derivative: use mode='sum' or 'mean', or nn.Embedding and amax"
        )
    flat = input.reshape(-1)
    places = torch.arange(len(flat), device=flat.device)
    if offsets is None:
        bags, count = places // input.shape[1], input.shape[0]
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        # Of equal starts the last has the entries: the others are empty bags.
        bags, count = torch.bucketize(places, starts, right=True) - 1, len(starts)
    rows = weight[flat]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if padding_idx is not None:
        kept = flat != padding_idx % len(weight)
        rows, bags = rows[kept], bags[kept]
    sums = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    return sums if mode == "sum" else sums / bags.bincount(minlength=count).clamp(min=1)[:, None]


def _refuse(function: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None:
        raise DoubleBackwardError(
            f"the training loss uses {function} with max_norm={max_norm}, which moves weights in "
            "the forward pass where no gradient sees it: leave it out, a weight decay does the like"
        )
    if scale_grad_by_freq:
        raise DoubleBackwardError(
            f"the training loss uses {function} with scale_grad_by_freq=True, whose gradient is "
            "not that of any loss: leave it out"
        )


PRIMITIVES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.multi_margin_loss: _multi_margin_loss,
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    F.embedding_bag: _embedding_bag,
    **CONVOLUTIONS,
}
"""What stands in for each function, with its arguments."""


class StandIns(TorchFunctionMode):
    """Inside, other functions are called in the place of some.

    Attributes:
        functions: What stands in for each, with its arguments.
    """

    functions: ClassVar[dict[Callable[..., Any], Callable[..., Any]]]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, or what stands in for it."""
        return self.functions.get(func, func)(*args, **(kwargs or {}))


class Primitives(StandIns):
    """Inside, others stand in for functions whose second derivatives cannot be relied on."""

    functions: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = PRIMITIVES
