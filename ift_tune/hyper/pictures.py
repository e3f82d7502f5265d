"""Training inputs as images, whether they come as such or as rows of pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from ift_tune.errors import UsageError

Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width."""


def on_images(
    function: Callable[[Tensor], Tensor], inputs: Tensor, shape: Shape | None, who: str
) -> Tensor:
    """Apply a function of images, (B, C, H, W) to the same shape, to images or to rows of pixels.

    Args:
        function: What to apply.
        inputs: Images (B, C, H, W); or rows (B, C·H·W), which come back as rows.
        shape: What the rows are; None if the inputs are images.
        who: For errors.

    Raises:
        UsageError: If the inputs are neither, or no floating-point numbers.
    """
    if not inputs.is_floating_point():
        raise UsageError(f"{who} needs images of floating-point numbers, got {inputs.dtype}")
    if inputs.ndim == 4:
        return function(inputs)
    if shape is None:
        raise UsageError(
            f"{who} needs images of shape (B, C, H, W), got {tuple(inputs.shape)}: for rows of "
            "pixels, say what they are by shape=(channels, height, width)"
        )
    if inputs.ndim != 2 or inputs.shape[1] != shape[0] * shape[1] * shape[2]:
        raise UsageError(
            f"{who} was told that rows are images of shape {shape}, and got inputs of shape "
            f"{tuple(inputs.shape)}"
        )
    return function(inputs.reshape(-1, *shape)).flatten(1)
