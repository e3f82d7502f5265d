"""What a user's code returns, looked at in the one place where it comes in.

What is right passes a few comparisons of types; only what is wrong costs more than that, for a
sentence that says how to mend it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ift_tune.base.arguments import require_instance, shown
from ift_tune.base.errors import UsageError
from ift_tune.base.views import View
from ift_tune.implicit.penalty import Penalty


def as_loss(value: Any, name: str, *, graph: bool = True) -> Tensor:
    """Return what a loss function returned.

    Args:
        value: What it returned.
        name: Of the function, for the error.
        graph: Whether autograd shall be able to follow it.

    Raises:
        UsageError: If it is no scalar floating-point tensor, or has no graph.
    """
    if (
        isinstance(value, Tensor)
        and value.ndim == 0
        and value.is_floating_point()
        and (value.requires_grad or not graph)
        and not value.is_meta
    ):
        return value
    raise UsageError(f"{name} must return {_wanted(value)}")


def _wanted(value: Any) -> str:
    """Return what a loss has to be, with the mend for what it is."""
    if value is None:
        return "the loss, a scalar tensor: is a `return` missing? got None"
    if isinstance(value, Tensor):
        if value.ndim:
            return f"a scalar: take the mean or the sum over it, got shape {tuple(value.shape)}"
        if not value.is_floating_point():
            return f"a floating-point number: compute it in float32 or float64, got {value.dtype}"
        if value.is_meta:
            return "a number: build the model and the batches on a real device, got device meta"
        return (
            "a tensor that depends on the parameters through autograd: leave out detach(), item() "
            "and no_grad(), got one without a graph"
        )
    kind = type(value).__name__
    if isinstance(value, int | float) or hasattr(value, "dtype"):
        return f"a tensor: leave out float(), item() and numpy(), got a {kind}"
    return f"a scalar tensor: the loss by itself, such as outputs.loss or loss.mean(), got a {kind}"


def as_penalty(value: Any) -> Penalty | None:
    """Return what ``penalty()`` returned.

    Raises:
        UsageError: If it is neither a `Penalty` nor None.
    """
    if value is None or isinstance(value, Penalty):
        return value
    raise UsageError(
        "penalty must return an ift_tune.Penalty or None; a regulariser without closed forms is "
        f"added in train_loss, got {shown(value)}"
    )


def as_words(value: Any) -> str:
    """Return what ``words()`` returned.

    Raises:
        UsageError: If it is no text.
    """
    require_instance("what words returns", value, str, "a sentence, a text")
    return str(value)


def as_views(value: Any) -> list[View]:
    """Return what ``views()`` returned.

    Raises:
        UsageError: If it is no list of views.
    """
    if isinstance(value, list | tuple) and all(isinstance(view, View) for view in value):
        return list(value)
    raise UsageError(f"views must return a list of views (see base.views), got {shown(value)}")
