"""Float32 that is float32: what a GPU rounds on the way, and how to do without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ift_tune.base.exclusive import exclusive

_TF32 = 2.0**-11  # ten bits and the one that is implied


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[float]:
    """Compute in float32 what a GPU computes in TensorFloat-32, as its convolutions do by default.

    The difference of two gradients that are rounded to ten bits each is noise.

    Args:
        device: Where one computes; on a CPU nothing changes.

    Yields:
        The relative rounding of what was computed before, beyond that of its type.
    """
    if device.type != "cuda":
        yield 0.0
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with exclusive():
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        try:
            yield _TF32 if any(before) else 0.0
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def rounding_of_kernels(device: torch.device) -> float:
    """Return the relative rounding of a device's kernels where it is coarser than float32's; or 0.

    Args:
        device: Where one computes.
    """
    if device.type != "cuda":
        return 0.0
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return _TF32 if allowed else 0.0
