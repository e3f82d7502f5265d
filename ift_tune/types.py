"""Vocabulary shared by every module: tensor lists, and how a solve or a trial ended."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

Tensors: TypeAlias = Sequence[Tensor]
"""A vector in weight space or hyperparameter space, kept as the list of its tensors."""

TensorSource: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""What a user may pass where tensors are wanted; modules and mappings name them in errors."""

Batch: TypeAlias = Any
"""Whatever a loader yields: a tensor, or a tuple, list or dict of them."""


@runtime_checkable
class Loader(Protocol):
    """Anything that can be iterated over again and again: a `DataLoader`, a list, `Batches`."""

    def __iter__(self) -> Any:
        """Start one pass over the split."""


class Status(enum.Enum):
    """How an inverse-Hessian-vector product, and so a hypergradient, came out."""

    CONVERGED = "converged"
    TRUNCATED = "truncated"
    NEGATIVE_CURVATURE = "negative_curvature"
    SINGULAR = "singular"
    DIVERGED = "diverged"
    NONFINITE = "nonfinite"

    @property
    def advice(self) -> str:
        """What the status means and which knob to turn."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The linear system was solved to the tolerance asked for.",
    Status.TRUNCATED: (
        "The series was cut before it converged, the normal state of a cheap hypergradient. For a "
        "more exact one raise `terms` (or `max_steps`), or `alpha` (below 2/λ_max)."
    ),
    Status.NEGATIVE_CURVATURE: (
        "The Hessian has a negative eigenvalue, so the weights are not at a minimum: train longer "
        "between outer steps (`inner_steps`), add `damping`, or use curvature='gauss_newton'."
    ),
    Status.SINGULAR: (
        "The Hessian has (nearly) zero eigenvalues, so the inner problem has no unique answer: "
        "add `damping` or a weight decay."
    ),
    Status.DIVERGED: (
        "α·λ_max exceeds 2, so every further Neumann term makes the answer worse: lower `alpha`, "
        "or use alpha='auto' or `alpha_scale` below 2."
    ),
    Status.NONFINITE: (
        "A loss or gradient is infinite or NaN: lower `inner_lr` or `meta_lr`, and look for a "
        "square root or logarithm at zero in the loss."
    ),
}


class StopReason(str, enum.Enum):
    """Why a trial ended: a closed list, the same words in every table and backend."""

    DONE = "done"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    NONFINITE = "nonfinite"
    OOM = "oom"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
