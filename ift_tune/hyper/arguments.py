"""Checks of what a kind of hyperparameters is made of, before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import require_instance, shown
from ift_tune.base.errors import UsageError, require_integer


def require_model(model: object) -> None:
    """Raise a `UsageError` unless `model` is a module, which its class is not."""
    require_instance("model", model, nn.Module, "an nn.Module, whose parameters are trained")


def require_like(like: Tensor | None) -> None:
    """Raise a `UsageError` unless `like` is a tensor whose dtype a λ can have, or None."""
    if like is None:
        return
    form = "a tensor whose dtype and device λ takes, such as next(model.parameters())"
    require_instance("like", like, Tensor, form)
    if not like.is_floating_point():
        raise UsageError(f"like must be a tensor of real numbers, got {like.dtype}")


def new_raw(shape: int | Sequence[int], like: Tensor | None) -> Tensor:
    """Return a tensor for λ, not filled, of the dtype and on the device of `like`.

    Raises:
        UsageError: If `like` is no tensor of real numbers.
    """
    require_like(like)
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.empty(size) if like is None else like.new_empty(size)


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Return a whole number, NumPy's too, as Python's.

    Raises:
        UsageError: If it is none, or is below `least`.
    """
    if isinstance(value, Tensor):
        raise UsageError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    require_integer(name, value, least)
    return int(value)  # type: ignore[call-overload, no-any-return]


def whole_numbers(name: str, values: object, form: str) -> tuple[int, ...]:
    """Return a shape as Python's numbers.

    Raises:
        UsageError: If it is no sequence of whole numbers of at least 1, or is empty.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UsageError(f"{name} must be {form}, got {shown(values)}")
    return tuple(whole_number(name, value) for value in values)


def require_mapping(name: str, value: Any, form: str) -> None:
    """Raise a `UsageError` unless a value is a mapping, of texts as names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name} must be a mapping of {form}, got {shown(value)}")


def require_images(shape: object) -> None:
    """Raise a `UsageError` unless a shape is that of an image, or None."""
    if shape is not None and len(whole_numbers("shape", shape, _IMAGE)) != 3:
        raise UsageError(f"shape must be {_IMAGE}, got {shown(shape)}")


_IMAGE = "channels, height and width, such as (3, 32, 32)"
