"""Scales become part of the adapters' weights: when that leaves the model as it is, and how."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.hyper.adapter_sites import AdapterSite
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.outputs import call_model

_log = logging.getLogger(__name__)
_BESIDE = "leave the scales beside the model"


@torch.no_grad()
def fold(model: nn.Module, sites: Sequence[AdapterSite], inputs: Any = None) -> None:
    """Multiply each scale into the adapter's weights and take it out of the model.

    Args:
        model: In which the sites are.
        sites: All of them, or some.
        inputs: Of a call of the model, which then must return the same before and after; None for
            no comparison.

    Raises:
        UsageError: If one cannot be folded, or the model returns something else afterwards; then
            all are as they were.
    """
    weights = [site.foldable() for site in sites]
    _require_own(model, sites, weights)
    wanted = None if inputs is None else _outputs(model, inputs)
    _require_called(sites)
    every = list(chain(*weights))
    before = [tensor.detach().clone() for tensor in every]
    try:
        for site, tensors in zip(sites, weights, strict=True):
            factor = site.scale()
            for tensor in tensors:
                tensor.mul_(factor.to(tensor))
        if wanted is not None:
            _require_same(wanted, _unscaled(model, sites, inputs), every)
    except BaseException:
        for tensor, old in zip(every, before, strict=True):
            tensor.copy_(old)
        raise
    for site in sites:
        site.remove()


def _unscaled(model: nn.Module, sites: Sequence[AdapterSite], inputs: Any) -> Tensor:
    """Return what the model returns with scales of 1; the hooks stay, in their order."""
    scales = [site.scale for site in sites]
    try:
        for site in sites:
            site.scale = _one
        return _outputs(model, inputs)
    finally:
        for site, scale in zip(sites, scales, strict=True):
            site.scale = scale


def _one() -> Tensor:
    return torch.ones(())


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    with evaluating(model), preserved_buffers(model):
        found = call_model(model, inputs)
    answers = found.loss if found.outputs is None else found.outputs
    if answers is None:
        raise UsageError(
            "the model must return outputs or a loss on the inputs that fold() is given: give it "
            "those of a batch, targets too where the model takes them, got neither"
        )
    return answers.clone()


def _require_same(wanted: Tensor, found: Tensor, weights: Sequence[Tensor]) -> None:
    """Refuse outputs that differ by more than rounding.

    Raises:
        UsageError: If they do.
    """
    # A weight's product with a scale is rounded as often as there are weights, each another way.
    types = [t.dtype for t in (wanted, *weights) if t.is_floating_point()]
    allowed = math.sqrt(max(torch.finfo(dtype).eps for dtype in types))
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not error <= allowed * size:
        raise UsageError(
            "folding must leave what the model does: something beside the scaled modules uses "
            f"their weights, or outputs are random in evaluation mode; {_BESIDE}, got outputs that "
            f"differ by {error:.2g} where they reach {size:.2g}"
        )


def _require_called(sites: Sequence[AdapterSite]) -> None:
    """Refuse scales that the model has passed by: in its weights they would act.

    Raises:
        UsageError: If there are any.
    """
    idle = [site.name for site in sites if not site.called]
    if len(idle) == len(sites):
        # A model that was just loaded has scales that acted where λ was learned.
        _log.warning(
            "the model has not been called since its scales were made, so nothing shows that each "
            "of them acts: give fold() the inputs of a batch to compare what the model returns"
        )
        return
    if idle:
        raise UsageError(
            "each scaled module must be called by the model for its scale to be folded, not its "
            "weights be used by another one, as those of out_proj by nn.MultiheadAttention: make "
            f"an AdapterScale without it, or call the model where it comes by all; got "
            f"{', '.join(idle[:3])}, not called so far"
        )


def _require_own(
    model: nn.Module, sites: Sequence[AdapterSite], weights: Sequence[Sequence[Tensor]]
) -> None:
    """Refuse weights that something else in the model has too.

    Raises:
        UsageError: If there are any.
    """
    places = list(_named_tensors(model))
    roots: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        roots.setdefault(id(module), []).append(f"{name}." if name else "")
    taken: dict[str, str] = {}
    for site, tensors in zip(sites, weights, strict=True):
        for tensor in tensors:
            # Of a module that is there twice, each name is its own; of a tensor in it, the first.
            inside = next(n for n, t in _named_tensors(site.module) if t is tensor)
            own = {f"{root}{inside}" for root in roots[id(site.module)]}
            others = [n for n, t in places if n not in own and _overlap(t, tensor)]
            others += [taken[n] for n in own if n in taken]
            if others:
                raise UsageError(
                    f"{site.name} must have weights of its own for its scale to be folded into: "
                    f"{_BESIDE}, got weights that {others[0]} has too"
                )
            taken |= dict.fromkeys(own, site.name)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have memory in common, as those tied by ``.data`` have."""
    if one is other:
        return True
    (start, end), (begin, stop) = _span(one), _span(other)
    return start < stop and begin < end


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0 or tensor.is_meta:
        return 0, 0
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
