"""Closed lists that every room uses: how a solve came out, how a trial ended, names of columns."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ift_tune.base.cards import RUN_FILES, Card, Table, shown


class SolveStatus(enum.Enum):
    """How an inverse-Hessian-vector product, and so a hypergradient, came out.

    Example:
        >>> import ift_tune
        >>> print(ift_tune.SolveStatus("converged").advice)
        The linear system was solved to the tolerance asked for.
    """

    CONVERGED = "converged"
    TRUNCATED = "truncated"
    NEGATIVE_CURVATURE = "negative_curvature"
    SINGULAR = "singular"
    DIVERGED = "diverged"
    NONFINITE = "nonfinite"

    @property
    def advice(self) -> str:
        """What the status means and which setting to change."""
        return _ADVICE[self]


_ADVICE = {
    SolveStatus.CONVERGED: "The linear system was solved to the tolerance asked for.",
    SolveStatus.TRUNCATED: (
        "The series was cut before it converged, the normal state of a cheap hypergradient. For a "
        "more exact one raise `terms` (or `max_steps`), or `alpha` (below 2/λ_max); where the "
        "residual stands still at any length, compute the losses in a higher precision."
    ),
    SolveStatus.NEGATIVE_CURVATURE: (
        "The Hessian has a negative eigenvalue, so the weights are not at a minimum: train longer "
        "between outer steps (`inner_steps`), add `damping`, or use curvature='gauss_newton'."
    ),
    SolveStatus.SINGULAR: (
        "The Hessian has eigenvalues that are zero to rounding, so the inner problem has no unique "
        "answer, and a solution along them is noise: add `damping` or a weight decay, or use "
        "neumann, which does not go far along them."
    ),
    SolveStatus.DIVERGED: (
        "α·λ_max exceeds 2, so every further Neumann term makes the answer worse: lower `alpha`, "
        "or use alpha='auto' or `alpha_scale` below 2."
    ),
    SolveStatus.NONFINITE: (
        "A loss or gradient is infinite or NaN: look for NaN in the data, lower `inner_lr` or "
        "`meta_lr`, and look for a square root or logarithm at zero in the loss."
    ),
}


class StopReason(str, enum.Enum):
    """Why a trial ended: a closed list, the same words in every table and backend.

    Example:
        >>> from ift_tune import StopReason
        >>> StopReason("oom") is StopReason.OOM  # the word in the tables' column ``stop_reason``
        True
        >>> StopReason.DONE == "done"
        True
    """

    DONE = "done"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    NONFINITE = "nonfinite"
    OOM = "oom"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_final(self) -> bool:
        """Whether it would end so again: memory may be back, and a mistake mended."""
        return self not in (StopReason.OOM, StopReason.FAILED, StopReason.INTERRUPTED)


class TrialStatus(str, enum.Enum):
    """Where a trial stands: a closed list, the words of the tables' column ``status``."""

    RUNNING = "running"
    COMPLETE = "complete"
    PRUNED = "pruned"
    """Stopped early, by a pruner, by divergence or for want of memory."""
    INTERRUPTED = "interrupted"
    FAILED = "failed"

    @classmethod
    def after(cls, reason: StopReason) -> TrialStatus:
        """Return where a trial stands that ended for this reason."""
        return _AFTER.get(reason, cls.PRUNED)


_AFTER = {
    StopReason.DONE: TrialStatus.COMPLETE,
    StopReason.FAILED: TrialStatus.FAILED,
    StopReason.INTERRUPTED: TrialStatus.INTERRUPTED,
}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        stop_reason: Why.
        value: The search metric at the end; None if it was never measured.
        metric: Its name.
        metrics: The latest value of everything measured, retrained metrics included.
        mode: ``"min"`` or ``"max"``: the direction in which the metric is better.
        run: The run directory, where there is one that `run_single` was called with.
    """

    stop_reason: StopReason
    value: float | None
    metric: str
    metrics: dict[str, Any]
    mode: str = "min"
    run: Path | None = field(default=None, compare=False)

    @property
    def fault(self) -> str:
        """In words, what was not finite, where that has ended it; else empty."""
        return str(self.metrics.get(FAULT) or "")

    @property
    def ending(self) -> str:
        """Why it ended, and the words on it."""
        return f"{self.stop_reason.value}, {self.fault}" if self.fault else self.stop_reason.value

    def __repr__(self) -> str:
        return self._card().text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._card().html()

    def _card(self) -> Card:
        steps = self.metrics.get("step")
        after = "" if steps is None else f" after {steps} outer step{'s' * (steps != 1)}"
        better = "higher is better" if self.mode == "max" else "lower is better"
        value = "" if self.value is None else f": {self.metric} {shown(self.value)} ({better})"
        learned = self.metrics.get("learned_words")
        return Card(
            f"Run {self.stop_reason.value}{after}{value}",
            [*([f"learned: {learned}"] if learned else []), *([self.fault] if self.fault else [])],
            _by_split(self.metrics),
            self.run,
            RUN_FILES,
        )


_SPLITS = (
    *("train", "val", "search", "test", "retrained_search", "retrained_test"),
    *("baseline_search", "baseline_test"),
)


def _by_split(measured: Mapping[str, Any]) -> Table:
    """Return what was measured of each split, a row a measure."""
    kinds = [name.removeprefix("search_") for name in measured if name.startswith("search_")]
    found = [s for s in _SPLITS if any(f"{s}_{kind}" in measured for kind in kinds)]
    rows = [[kind, *(measured.get(f"{split}_{kind}") for split in found)] for kind in kinds]
    return Table(["", *(split.replace("_", " ") for split in found)], rows)


HEALTH_COLUMNS = (
    "solve_status",
    "relative_residual",
    "alpha_lambda_max",
    "negative_curvature",
    "inner_gradient_norm",
    "inner_update_norm",
    "hypergradient_norm",
    "hypergradient_agreement",
    "hypergradient_signal",
    "memorised",
    "hyper_change",
    "skipped",
    "val_test_gap",
)
"""What each outer step says of its linear solve.

solve_status: a `SolveStatus` value.
relative_residual: ‖v − H·q‖/‖v‖ (Neumann: an upper bound). Small is exact; near 1 the series has
    barely begun; above 1 it diverges.
alpha_lambda_max: α·λ_max, estimated from below (Neumann only). The series diverges above 2.
negative_curvature: 1 where a direction of negative curvature was met, else 0.
inner_gradient_norm: ‖∂L_T/∂w‖ on the batch of the last inner step, the penalty included, before
    clipping. The implicit function theorem holds where the whole training loss has it at 0.
inner_update_norm: ‖Δw‖ of that step: how far the weights still move.
hypergradient_norm: ‖dL_V/dλ‖.
hypergradient_agreement: cosine of the hypergradient with the optimiser's mean of earlier ones,
    where it keeps one (Adam, momentum): 1 is signal alone, 0 noise alone.
hypergradient_signal: signal over noise: what of ‖dL_V/dλ‖ is above its standard error over the
    validation examples, over that error. 1 where both are equal, 0 for noise alone. Where it is
    asked for (`MetaConfig.signal_every`); of each of several kinds too, its name after a point.
memorised: 1 where the training loss is below a thousandth of what it was before the first step of
    the present weights and the hypergradient has vanished, or is below its noise, else 0.
hyper_change: root mean square of λ's change since the start, in units of the spread of its initial
    values; in its own where they are all equal, so that of a logarithm .69 is a factor of two.
skipped: 1 where the hypergradient was unusable and λ stayed as it was, else 0.
val_test_gap: test minus validation error (loss where there is no error): how far λ overfits.
"""

START_CHECK_COLUMNS = ("start_check_status", "start_check_gradients")
"""What the check at the start of a trial found, and what it cost in gradients, in its rows."""

PEAK_MEMORY = "peak_memory_bytes"
NUMBER_COLUMNS = (
    *("step", "gradient_equivalents", "hvps", "wall_seconds", PEAK_MEMORY),
    *(name for name in HEALTH_COLUMNS if name not in ("solve_status", "val_test_gap")),
    START_CHECK_COLUMNS[1],
)
"""Columns of numbers that every trial may have, those of the test split aside."""

FAULT = "fault"
"""Column of a trial that ended because a number was not finite: which one, in words."""

FOUND_PREFIXES = ("retrained_", "learned_")
"""How the names of what is measured once, at a trial's end, begin."""

COARSE_PREFIX = "knob."
"""How the columns of coarse parameters begin: they were called knobs, and tables keep their names.
"""

FEATURED = (
    *("search_error", "search_loss", "test_error", "test_loss"),
    *("retrained_test_error", "retrained_test_loss"),
    *("gradient_equivalents", "hvps", "wall_seconds"),
)
"""Metrics that are kept as user attributes of a study's trials."""

RUNNING = {"status": TrialStatus.RUNNING.value, "stop_reason": None}
"""The `status` and `stop_reason` of a trial that has begun and not ended."""


def ending(reason: StopReason) -> dict[str, str]:
    """Return the `status` and `stop_reason` of a trial that ended for this reason."""
    return {"status": TrialStatus.after(reason).value, "stop_reason": reason.value}


def stopped_early(result: Mapping[str, Any]) -> StopReason:
    """Return why a search stopped a trial that had not ended by itself, from its last result."""
    bad = (SolveStatus.DIVERGED.value, SolveStatus.NONFINITE.value)
    return StopReason.DIVERGED if result.get("solve_status") in bad else StopReason.PRUNED


def found_at_the_end(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured once, at the trial's end."""
    return {k: v for k, v in metrics.items() if k.startswith(FOUND_PREFIXES)}
