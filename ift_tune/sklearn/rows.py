"""Which rows are trained on, which fit the hyperparameters, and which choose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ift_tune.base.errors import UsageError, require_number
from ift_tune.problem.splitting import drawn

Array = npt.NDArray[Any]

_TO_VAL = 2 / 3  # of the rows that are held out; the others choose steps and trials


class Rows(NamedTuple):
    """Inputs (N, features) with their class numbers (N,), or targets (N, ...)."""

    inputs: Array
    targets: Array

    def at(self, places: Array) -> Rows:
        """Return some of the rows."""
        return Rows(self.inputs[places], self.targets[places])


def split_rows(
    rows: Rows, val: Rows | None, fraction: float, seed: int, *, stratify: bool
) -> dict[str, Array]:
    """Return the positions of the rows of ``"train"``, ``"val"`` and ``"search"``, in order.

    Args:
        rows: All there are to train on.
        val: Rows for the validation; None to hold out some of `rows`.
        fraction: How many of them then.
        seed: Of the draw.
        stratify: Whether the targets are classes, which are shared out evenly.

    Raises:
        UsageError: If too few rows are left to train on, or the classes cannot be shared out.
    """
    require_number("validation_fraction", fraction, above=0.0)
    if fraction >= 1.0:
        raise UsageError(f"validation_fraction must be below 1, got {fraction!r}")
    whole = rows if val is None else val
    number = len(whole.inputs)
    out = number if val is not None else max(2, round(fraction * number))
    search = max(1, round((1.0 - _TO_VAL) * out))
    sizes = {"val": out - search, "search": search}
    if val is None:
        if out >= number:
            raise UsageError(
                f"validation_fraction must leave rows to train on, got {fraction!r} of {number} "
                "rows"
            )
        sizes = {"train": number - out, **sizes}
    labels = whole.targets if stratify else None
    parts = _shared_out(list(sizes.values()), labels, seed, own=val is None)
    found = {name: np.sort(part) for name, part in zip(sizes, parts, strict=True)}
    return found if val is None else {"train": np.arange(len(rows.inputs)), **found}


def _shared_out(sizes: Sequence[int], labels: Array | None, seed: int, *, own: bool) -> list[Array]:
    """Return the positions of the rows of each part, drawn without replacement.

    Args:
        sizes: Of the parts; all rows together.
        labels: The class of each row, in the same shares in each part; None for any rows.
        seed: Of the draw.
        own: Whether the first part is trained on; else it fits λ, as all rows are for that.

    Raises:
        UsageError: If too few rows are of classes that every part can have.
    """
    rows = sum(sizes)
    if labels is None:
        return [part.numpy() for part in drawn(sizes, rows, seed, None)]
    _, number, total = np.unique(labels, return_inverse=True, return_counts=True)
    rare = total[number] < len(sizes)
    first = sizes[0] - int(rare.sum())
    if first < 1:
        wanted = (
            "one to train on and others to validate by: leave rare classes out, or give X_val and "
            "y_val"
            if own
            else "one to fit λ and one to choose steps by: give more rows as X_val and y_val"
        )
        raise UsageError(
            f"each class must have at least {len(sizes)} rows, {wanted}, got {int(rare.sum())} of "
            f"{rows} rows in smaller classes"
        )
    others = np.flatnonzero(~rare)
    parts = drawn([first, *sizes[1:]], len(others), seed, torch.from_numpy(number[others]))
    found: list[Array] = [others[part.numpy()] for part in parts]
    if rare.any():
        wanted = (
            "are trained on, and not validated by: no split can have them all"
            if own
            else "of y_val fit λ, and no step is chosen by them: give more of them"
        )
        warnings.warn(
            f"{int(rare.sum())} rows of {len(np.unique(number[rare]))} classes with fewer than "
            f"{len(sizes)} rows {wanted}",
            UserWarning,
            stacklevel=5,
        )
        found[0] = np.concatenate([found[0], np.flatnonzero(rare)])
    return found
