"""Arithmetic on lists of tensors seen as one vector, with PyTorch's foreach kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError

Tensors: TypeAlias = Sequence[Tensor]
"""A vector in weight space or hyperparameter space, kept as the list of its tensors."""

TensorSource: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""What a user may pass where tensors are wanted; modules and mappings name them in errors."""


def dot(a: Tensors, b: Tensors) -> Tensor:
    """Return the inner product of two vectors as a scalar tensor."""
    # A tensor and no number: on a GPU each float() waits for all that was asked for before.
    products = [
        torch.dot(x, y) if x.ndim == y.ndim == 1 else torch.dot(x.reshape(-1), y.reshape(-1))
        for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(products).sum() if len(products) > 1 else products[0]


def joined(a: Tensors) -> Tensors:
    """Return a vector as inner products take it: on a device as one tensor, for one kernel each."""
    if a[0].is_cpu or len({x.dtype for x in a}) > 1:
        return a
    return [flatten(a)]


def norm(a: Tensors) -> Tensor:
    """Return the Euclidean norm of a vector as a scalar tensor."""
    length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(a))))
    return length


_RUN = 1 << 20  # entries


def runs(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Yield runs of tensors that are small together, or one large tensor each.

    An operation on a list keeps a list of its results: of a whole model's tensors one model more.
    """
    start = size = 0
    for i, tensor in enumerate(tensors):
        if size and size + tensor.numel() > _RUN:
            yield slice(start, i)
            start, size = i, 0
        size += tensor.numel()
    if size:
        yield slice(start, len(tensors))


def axpy(a: Tensors, scale: float | Tensor, b: Tensors) -> list[Tensor]:
    """Return the new vector ``a + scale · b``."""
    if not isinstance(scale, Tensor) or scale.is_cpu:
        return list(torch._foreach_add(list(a), list(b), alpha=float(scale)))  # in one pass
    scaled = mul(b, scale)
    if all(s.dtype == x.dtype for s, x in zip(scaled, a, strict=True)):
        torch._foreach_add_(scaled, list(a))  # in its place: a vector may be as large as a model
        return scaled
    return list(torch._foreach_add(list(a), scaled))


def axpy_(a: Tensors, scale: float | Tensor, b: Tensors) -> None:
    """Add ``scale · b`` to `a` in place."""
    if not isinstance(scale, Tensor) or scale.is_cpu:
        torch._foreach_add_(list(a), list(b), alpha=float(scale))
    else:
        torch._foreach_add_(list(a), mul(b, scale))


def add(a: Tensors, b: Tensors) -> list[Tensor]:
    """Return the new vector ``a + b``."""
    return list(torch._foreach_add(list(a), list(b)))


def sub(a: Tensors, b: Tensors) -> list[Tensor]:
    """Return the new vector ``a − b``."""
    return list(torch._foreach_sub(list(a), list(b)))


def mul(a: Tensors, scale: float | Tensor) -> list[Tensor]:
    """Return the new vector ``scale · a``."""
    return list(torch._foreach_mul(list(a), _as_scale(scale, a)))


def div(a: Tensors, scale: float | Tensor) -> list[Tensor]:
    """Return the new vector ``a / scale``; not by its inverse, which may be infinite."""
    return list(torch._foreach_div(list(a), _as_scale(scale, a)))


def _as_scale(scale: float | Tensor, a: Tensors) -> Any:
    """Return a scale as the kernels for lists take it without a change of the list's types."""
    if not isinstance(scale, Tensor):
        return scale
    if scale.is_cpu:
        return float(scale)
    if len({x.dtype for x in a}) > 1:
        return [scale.to(x.dtype) for x in a]
    return scale.to(a[0].dtype)


def largest_entry(a: Tensors) -> Tensor:
    """Return the largest magnitude of an entry; NaN if one is NaN."""
    filled = [x for x in a if x.numel()]
    return (
        torch.stack(torch._foreach_norm(filled, math.inf)).max() if filled else a[0].new_zeros(())
    )


def all_finite(a: Tensors, length: float | None = None) -> bool:
    """Return whether no entry is infinite or NaN.

    Args:
        a: The vector.
        length: Its norm, where that has been read already.
    """
    if length is None:
        # What is not finite leaves no sum, which takes a tenth of the time of a look at each.
        length = float(torch.stack([x.sum().double() for x in a]).sum())
    if math.isfinite(length):
        return True
    return all(bool(torch.isfinite(x).all()) for x in a)  # the sum itself may have overflowed


def zeros_like(a: Tensors) -> list[Tensor]:
    """Return a zero vector of the shapes of `a`."""
    return [torch.zeros_like(x) for x in a]


def fill_missing(values: tuple[Tensor | None, ...], like: Tensors) -> list[Tensor]:
    """Replace the ``None`` that autograd gives for an unused tensor by zeros."""
    return [torch.zeros_like(x) if v is None else v for v, x in zip(values, like, strict=True)]


def randn_like(a: Tensors, seed: int) -> list[Tensor]:
    """Return a standard normal vector of the shapes of `a`; the same for the same `seed`."""
    # Drawn on the CPU, so that a device does not change what is drawn.
    cpu = torch.device("cpu")  # whatever the default device is
    generator = torch.Generator(cpu).manual_seed(seed)
    return carried(
        [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=cpu) for x in a], a
    )


def scattered_like(a: Tensors, seed: int) -> list[Tensor]:
    """Return pseudo-random numbers between −1 and 1, of the shapes of `a`, made where `a` is.

    They are the same on every device, and none is 0. Nothing is carried to the device, and no
    generator's state is needed: entry i is a hash of i and the seed, in whole numbers, which round
    nowhere.
    """
    total, device = count(a), a[0].device
    dtype = common_dtype(a)
    pieces = []
    for start in range(0, total, _RUN):  # in runs: the whole numbers take twice as much as floats
        stop = min(start + _RUN, total)
        bits = torch.arange(start, stop, dtype=torch.int64, device=device)
        bits.add_(seed * _GOLDEN).bitwise_and_(_WORD)
        for _ in range(2):
            bits.bitwise_xor_(bits >> 16).mul_(_MIXER).bitwise_and_(_WORD)
        bits.bitwise_xor_(bits >> 16)
        # The odd numbers of 25 bits with their sign: float32 holds each of them exactly.
        odd = (bits >> 8).mul_(2).sub_(_HALF - 1)
        pieces.append(odd.to(dtype).mul_(1.0 / _HALF))
    return unflatten(torch.cat(pieces) if len(pieces) > 1 else pieces[0], a)


_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2³² over the golden ratio: seeds that follow each other lie far apart
_MIXER = 0x45D9F3B  # of Mueller's hash of 32 bits; times a word it is below 2⁶³
_HALF = 1 << 24


def carried(host: Tensors, like: Tensors) -> list[Tensor]:
    """Return tensors on the device of others of their shapes and types, in one copy."""
    device = like[0].device
    if device.type == "cpu":
        return list(host)
    if len({x.dtype for x in host}) > 1:
        return [x.to(device) for x in host]
    return unflatten(flatten(host).to(device), like)


def flatten(a: Tensors) -> Tensor:
    """Return the vector as one tensor of shape ``(n,)``."""
    return torch.cat([x if x.ndim == 1 else x.reshape(-1) for x in a])


def unflatten(flat: Tensor, like: Tensors) -> list[Tensor]:
    """Cut a tensor of shape ``(n,)`` into tensors of the shapes and types of `like`."""
    pieces = torch.split(flat, [x.numel() for x in like])
    return [piece.view(x.shape).to(x.dtype) for piece, x in zip(pieces, like, strict=True)]


def common_dtype(a: Tensors) -> torch.dtype:
    """Return the type in which `flatten` holds a vector: of mixed ones, the most precise."""
    return max((x.dtype for x in a), key=lambda dtype: torch.finfo(dtype).bits)


def precision(a: Tensors) -> float:
    """Return the machine epsilon of the least precise tensor of a vector."""
    return max(torch.finfo(x.dtype).eps for x in a)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory without gaps or overlaps, in any order."""
    return torch.empty_like(tensor).stride() == tensor.stride()  # which are kept only if it does


def is_stacked(value: object) -> bool:
    """Return whether a value is a tensor that stands for several, inside of `torch.func.vmap`.

    No branch can be taken on its numbers: they are several at once.
    """
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def conform(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient with the type and memory layout of its parameter.

    A fused optimiser walks through raw memory: it would read a transposed gradient in the order of
    another matrix, without a word.
    """
    if gradient.stride() == parameter.stride() and gradient.dtype == parameter.dtype:
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def count(a: Tensors) -> int:
    """Return the number of entries of the vector."""
    return sum(x.numel() for x in a)


def relative_error(found: Tensors, truth: Tensors) -> float:
    """Return ‖found − truth‖/‖truth‖; the absolute error where the truth is 0."""
    difference = float(torch.linalg.vector_norm(flatten(sub(found, truth)).detach()))
    size = float(torch.linalg.vector_norm(flatten(truth).detach()))
    return difference / size if size > 0.0 else difference


def named(source: TensorSource, role: str) -> dict[str, Tensor]:
    """Return the differentiable tensors of `source` by name, checked.

    Args:
        source: A module (its trainable parameters), a mapping, or an iterable of tensors.
        role: What they are (``"weights"``, ``"hypers"``); names the nameless and the errors.

    Returns:
        The tensors in order; those without a name are called ``role[0]``, ``role[1]``, ...

    Raises:
        UsageError: If there is none, or one is not a float32/float64 tensor requiring gradients.
    """
    found: dict[str, Tensor]
    if isinstance(source, nn.Module):
        found = {n: p for n, p in source.named_parameters() if p.requires_grad}
    elif isinstance(source, Mapping):
        found = dict(source)
    elif isinstance(source, Tensor):
        raise UsageError(f"{role} must be a list of tensors, got one tensor; pass [{role}]")
    else:
        found = {f"{role}[{i}]": t for i, t in enumerate(source)}
    if not found:
        frozen = isinstance(source, nn.Module) and any(True for _ in source.parameters())
        why = "has frozen parameters alone: call requires_grad_() on some" if frozen else "is empty"
        raise UsageError(f"{role} {why}: there is nothing to differentiate by")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{role} must hold tensors; {name} is a {type(tensor).__name__}")
        # With the 8 bits of bfloat16 a Neumann term vⱼ₊₁ = vⱼ − αHvⱼ is rounding after few passes.
        if tensor.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"{name} is {tensor.dtype}; second derivatives need float32 or float64: "
                "keep the parameters in float32 (a bfloat16 forward under autocast is fine)"
            )
        if not tensor.requires_grad:
            raise UsageError(f"{name} does not require gradients; call {name}.requires_grad_()")
    return found
