"""What a finished trial's own rows say against its result, in words with the mend.

Each diagnosis is a function of the trial's steps that returns a sentence or None; its first words,
up to the colon, are the same in every trial, so that they can be counted.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ift_tune.base.direction import Direction, default_metric
from ift_tune.base.status import SolveStatus

DIAGNOSES = "diagnoses"
"""The column of the `trials` table."""

_SEPARATOR = "; "
_FEWEST_STEPS = 5  # of fewer rows, a median or a trend says nothing
_HARDLY = 0.3  # of the initial spread; of a kind that lives in logarithms, a change by a third
_ZERO_LOSS = 1e-3  # of the largest training loss
_NO_SIGNAL = 1e-2  # of the largest hypergradient
# With α·λ_max = .1, even ten terms have not left the first: (1 − (1 − .1)¹⁰) ≈ .65 for the stiffest
# direction, and nothing for all others.
_ALPHA_SMALL, _ALPHA_LARGE = 0.1, 2.0
# Adam's mean of earlier gradients has 1/19 of their variance. Where the noise is three times the
# signal, its cosine with the next gradient is (1/9)/√((1 + 1/9)·(1/19 + 1/9)) ≈ .26.
_AGREEMENT = 0.25
_LATE, _WORSE = 0.5, 1.05  # the best within this share of the steps; the last, times the best
_OFTEN = 0.1  # a share of the steps
_STILL, _MEMORISED = "λ hardly moved", "the training loss is zero, so λ gets no signal"

Columns: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Check: TypeAlias = Callable[[Columns], str | None]


def diagnose(steps: pd.DataFrame, metric: str | None = None, mode: str = "min") -> list[str]:
    """Return what is to be known of a trial before its result is believed.

    Args:
        steps: The trial's rows of the `steps` table.
        metric: What decides; default: ``search_error`` where it is measured, else ``search_loss``.
        mode: ``"min"`` or ``"max"``: the direction in which the metric is better.

    Returns:
        Sentences, each with the setting to change; none for a trial of less than five steps.

    Example:
        >>> import pandas as pd
        >>> from ift_tune.trial.diagnoses import diagnose
        >>> steps = pd.DataFrame({"step": range(1, 11), "hyper_change": [0.01] * 10})
        >>> diagnose(steps)
        ['λ hardly moved: by 0.01 in 10 steps (.69 is a factor of 2 ...): raise meta_lr, ...']
    """
    return diagnosed({str(name): np.asarray(steps[name]) for name in steps.columns}, metric, mode)


def diagnosed(columns: Columns, metric: str | None, mode: str) -> list[str]:
    """Return what `diagnose` does, of the columns of a trial's rows.

    A thousand trials are diagnosed whenever the tables are written, for which pandas is too slow.
    """
    if _count(columns) < _FEWEST_STEPS:
        return []
    found = [check(columns) for check in _CHECKS]
    found.append(_best_was_early(columns, metric, mode))
    return [sentence for sentence in found if sentence]


def joined(sentences: Sequence[str]) -> str:
    """Return sentences as one entry of the column, an empty one without any."""
    return _SEPARATOR.join(sentences)


def split(entry: object) -> list[str]:
    """Return the sentences of an entry of the column."""
    return entry.split(_SEPARATOR) if isinstance(entry, str) and entry else []


def of_nothing_learned(entry: object) -> list[str]:
    """Return the sentences of an entry if λ is what it was, for want of a signal; else none."""
    heads = {sentence.partition(":")[0]: sentence for sentence in split(entry)}
    return [heads[_MEMORISED], heads[_STILL]] if heads.keys() >= {_MEMORISED, _STILL} else []


def counted(entries: pd.Series[str]) -> list[str]:
    """Return what trials have in common: "in 3 of 5 trials λ hardly moved", the commonest first."""
    heads = Counter(s.partition(":")[0] for entry in entries for s in split(entry))
    return [f"in {count} of {len(entries)} trials {head}" for head, count in heads.most_common()]


def _hardly_moved(steps: Columns) -> str | None:
    change = _last(steps, "hyper_change")
    if change is None or change >= _HARDLY:
        return None
    return (
        f"{_STILL}: by {change:.2g} in {_count(steps)} steps (.69 is a factor of 2 for a "
        "kind in logarithms): raise meta_lr, or take more outer steps"
    )


def _no_signal(steps: Columns) -> str | None:
    loss, length = _late(steps, "train_loss"), _late(steps, "hypergradient_norm")
    if loss is None or length is None:
        return None
    (loss_now, loss_most), (length_now, length_most) = loss, length
    vanished = loss_now <= _ZERO_LOSS * loss_most and length_now <= _NO_SIGNAL * length_most
    known = _late(steps, "memorised")  # not in tables of earlier versions
    if not vanished and not (known and known[0] > 0.0):
        return _learned_by_heart(steps)
    return (
        f"{_MEMORISED}: {loss_now:.2g} at the end, and the "
        "hypergradient has vanished with it: let the weights, which have memorised the training "
        "data, begin anew (reinit_every=5), or take fewer inner steps, a weight decay or a smaller "
        "model"
    )


def _learned_by_heart(steps: Columns) -> str | None:
    error, val = _late(steps, "train_error"), _numbers(steps, "val_error")
    if error is None or error[0] > 0.0 or len(val) < _FEWEST_STEPS:
        return None
    late = len(val) - len(val) // 4
    least, now = float(val[:late].min()), float(np.median(val[late - 1 :]))
    if now <= _WORSE * least:
        return None
    return (
        f"every training label is fitted: train_error is 0 at the end, and val_error has risen "
        f"from {least:.3g} to {now:.3g}: a model that has learned wrong labels by heart says "
        "little of which they are: let the weights begin anew (reinit_every=5), or take fewer "
        "inner steps, a weight decay or a smaller model"
    )


def _alpha_small(steps: Columns) -> str | None:
    product = _median(steps, "alpha_lambda_max")
    if product is None or product >= _ALPHA_SMALL:
        return None
    return (
        f"α·λ_max is tiny: {product:.2g} in the median, so the terms hardly differ from none: set "
        "alpha_scale (1 means α = 1/λ_max) in place of alpha"
    )


def _alpha_large(steps: Columns) -> str | None:
    share = _share(steps, "alpha_lambda_max", lambda column: column > _ALPHA_LARGE)
    if share <= _OFTEN:
        return None
    return (
        f"α·λ_max is beyond 2: in {share:.0%} of the steps, where each further term makes the "
        "answer worse: lower alpha, or set alpha_scale below 2"
    )


def _noisy(steps: Columns) -> str | None:
    if (signal := _late(steps, "hypergradient_signal")) is not None and signal[0] < 1.0:
        return (
            f"the hypergradient is below its noise: {signal[0]:.2g} times its standard error over "
            "the validation examples is left at the end: larger validation batches, fewer "
            "hyperparameters, or spare such steps by signal_patience"
        )
    agreement = _mean(steps, "hypergradient_agreement")
    if agreement is None or agreement >= _AGREEMENT:
        return None
    return (
        f"the hypergradient is below its noise: its cosine with the mean of the earlier ones is "
        f"{agreement:.2g} on average: larger validation and curvature batches, or a lower meta_lr"
    )


def _skipped(steps: Columns) -> str | None:
    share = _share(steps, "skipped", lambda column: column > 0.0)
    if share <= _OFTEN:
        return None
    return (
        f"steps of λ were left out: {share:.0%} of the hypergradients were unusable: see "
        "solve_status, and lower alpha or meta_lr"
    )


def _bad_curvature(steps: Columns) -> str | None:
    for status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR):
        share = _share(steps, "solve_status", partial(operator.eq, status.value))
        if share > 0.5:
            name = status.value.replace("_", " ")
            return f"most solves met {name} ({100 * share:.0f} %): {_lowered(status.advice)}"
    return None


def _best_was_early(steps: Columns, metric: str | None, mode: str) -> str | None:
    metric = metric or default_metric(steps)
    if metric not in steps:
        return None
    step, value = _floats(steps["step"]), _floats(steps[metric])
    known = ~(np.isnan(step) | np.isnan(value))
    step, value = step[known], value[known]
    if len(value) < _FEWEST_STEPS:
        return None
    loss = Direction(mode).sign * value
    best = int(loss.argmin())
    lost = loss[-1] - loss[best]
    if step[best] > _LATE * step[-1] or lost <= (_WORSE - 1.0) * abs(value[best]):
        return None
    return (
        f"the best step was long before the last: {metric} was {value[best]:.4g} at step "
        f"{step[best]:.0f} and {value[-1]:.4g} at step {step[-1]:.0f}: the best counts, "
        "so spare the later steps by Budget(patience=) or --patience, or lower meta_lr"
    )


_CHECKS: tuple[Check, ...] = (
    _hardly_moved,
    _no_signal,
    _alpha_small,
    _alpha_large,
    _noisy,
    _skipped,
    _bad_curvature,
)


def _count(steps: Columns) -> int:
    return max(map(len, steps.values()), default=0)


def _floats(column: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column as numbers; NaN where there is none."""
    if column.dtype.kind in "biuf":
        return column.astype(float)
    return np.asarray(pd.to_numeric(pd.Series(column), errors="coerce"), dtype=float)


def _numbers(steps: Columns, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    known = _floats(steps[column]) if column in steps else np.empty(0)
    return known[~np.isnan(known)]


def _last(steps: Columns, column: str) -> float | None:
    found = _numbers(steps, column)
    return float(found[-1]) if len(found) else None


def _median(steps: Columns, column: str) -> float | None:
    found = _numbers(steps, column)
    return float(np.median(found)) if len(found) else None


def _mean(steps: Columns, column: str) -> float | None:
    found = _numbers(steps, column)
    fewest = _FEWEST_STEPS - 1  # the first step has none
    return float(found.mean()) if len(found) >= fewest else None


def _late(steps: Columns, column: str) -> tuple[float, float] | None:
    """Return the median of the last quarter, and the largest value of all."""
    found = _numbers(steps, column)
    if not len(found):
        return None
    return float(np.median(found[-max(1, len(found) // 4) :])), float(found.max())


def _share(steps: Columns, column: str, holds: Callable[[Any], Any]) -> float:
    """Return in which share of the steps that have the column something holds."""
    known = steps.get(column, np.empty(0))
    known = known[~pd.isna(known)]
    return float(np.mean(holds(known))) if len(known) else 0.0


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
