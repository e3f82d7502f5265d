"""How a linear solve came out, and how a trial ended: closed lists, the same words everywhere."""

from __future__ import annotations

import enum


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
