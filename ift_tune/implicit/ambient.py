"""Settings of PyTorch that lie around a call and change its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ift_tune.base.errors import UsageError


@contextlib.contextmanager
def ordinary_autograd(what: str, device: torch.device) -> Iterator[None]:
    """Run with gradients on, and refuse to run under autocast.

    Args:
        what: For the error: what is to be called elsewhere.
        device: Where it computes.

    Raises:
        UsageError: If autocast is on.

    Example:
        >>> import torch
        >>> from ift_tune.implicit.ambient import ordinary_autograd
        >>> with torch.inference_mode(), ordinary_autograd("step()", torch.device("cpu")):
        ...     torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        (True, False)
    """
    kinds = {"cpu", device.type} - {"meta"}
    if any(torch.is_autocast_enabled(kind) for kind in kinds):
        raise UsageError(
            f"{what} must be called outside autocast, which would go on with the weights of the "
            "first loss and solve in low precision: put `with torch.autocast(...)` inside the "
            f"losses or the model's forward, got autocast on {', '.join(sorted(kinds))}"
        )
    with _outermost(), torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def _outermost() -> Iterator[None]:
    """Let the autocast contexts inside be outermost ones.

    Autocast keeps its low-precision copies of weights until the outermost context ends, were it a
    disabled one: every later loss would see the weights of the first.
    """
    depth = torch.autocast_increment_nesting() - 1  # PyTorch has no other way to ask
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
