"""Arrays of any library as tensors of numbers that a model takes."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.arguments import plain, shown
from ift_tune.base.errors import UsageError


def as_rows(array: Any, name: str, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Return an array as a tensor whose first dimension counts the examples.

    Real numbers get `dtype`, whole ones int64; truth values stay.

    Args:
        array: A tensor, an array, a frame, a column of one, or lists.
        name: Of it, for errors.
        dtype: A model's.
        device: Where to; None leaves a tensor where it is.

    Raises:
        UsageError: If it holds something else than numbers, or no finite ones.
    """
    if isinstance(array, Tensor):
        rows = array.detach()
        if rows.is_complex() or rows.layout is not torch.strided:
            raise UsageError(
                f"{name} must be real numbers, all of them stored: give X.real and X.imag, or "
                f"X.to_dense(), got {rows.dtype} in a {rows.layout}"
            )
    else:
        rows = torch.from_numpy(_numbers(array, name))
    if not rows.ndim:
        raise UsageError(f"{name} must have a row for each example, got {shown(array)}")
    if rows.is_floating_point():
        rows = rows.to(dtype)
        lost = int((~rows.isfinite()).reshape(len(rows), -1).any(dim=1).sum()) if len(rows) else 0
        if lost:
            raise UsageError(
                f"{name} must be finite: fill in what is missing, or leave those rows out; for a "
                f"model that takes NaN, make the loaders by Batches; got {lost} rows with NaN or "
                "infinity"
            )
    elif rows.dtype is not torch.bool:
        rows = rows.long()
    return rows if device is None else rows.to(device)


def _numbers(array: Any, name: str) -> np.ndarray[Any, Any]:
    """Return a copy as an array of float64, int64 or truth values."""
    if hasattr(array, "toarray"):
        raise UsageError(
            f"{name} must be stored in full: give X.toarray(), got a {type(array).__name__}"
        )
    if np.ma.isMaskedArray(array) and np.ma.is_masked(array):
        array = np.ma.filled(array.astype(np.float64), np.nan)
    if hasattr(array, "dtypes") and hasattr(array, "columns"):  # a frame
        words = [str(column) for column in array.columns if _kind(array[column]) is None]
        if words:
            raise UsageError(
                f"{name} must hold numbers: encode words, for example by pandas.get_dummies("
                f"X, dtype=float), got other columns {', '.join(words[:5])}"
                f"{', ...' * (len(words) > 5)}"
            )
        kinds = {_kind(array[column]) for column in array.columns}
        kind = kinds.pop() if len(kinds) == 1 else "f" if "f" in kinds else "i"
    else:
        try:
            array = array if hasattr(array, "dtype") else np.asarray(_unwrapped(array))
        except ValueError as error:  # of lists of several lengths
            raise UsageError(
                f"{name} must have rows of one length: pad them, or make the loaders yourself, "
                f"got {shown(array)}"
            ) from error
        kind = _kind(array)
    if kind is None:
        raise UsageError(
            f"{name} must hold numbers: encode words and classes, for example by "
            f"numpy.unique(y, return_inverse=True)[1], got {shown(array)}"
        )
    wanted = {"f": np.float64, "i": np.int64, "b": np.bool_}[kind]
    if hasattr(array, "to_numpy"):  # pandas' own types know no value, which is NaN here
        if kind != "f" and array.isna().to_numpy().any():
            wanted = np.float64
        found = array.to_numpy(
            dtype=wanted, **({"na_value": np.nan} if wanted is np.float64 else {})
        )
        return np.array(found, dtype=wanted, order="C")
    return np.array(array, dtype=wanted, order="C")


def _kind(array: Any) -> str | None:
    """Return "f", "i" or "b" for real numbers, whole ones and truth values; None for others."""
    dtype = array.dtype
    kind = getattr(dtype, "kind", None)
    if kind == "O" and not hasattr(dtype, "categories"):
        # A column of numbers that has been put together from rows of Python objects.
        values = [plain(v) for v in np.asarray(array, dtype=object).reshape(-1).tolist()]
        if not all(isinstance(v, Real) or v is None for v in values):
            return None
        types = {type(v) for v in values}
        return "b" if types == {bool} else "i" if types <= {bool, int} else "f"
    if hasattr(dtype, "categories"):
        return None
    return {"f": "f", "i": "i", "u": "i", "b": "b"}.get(str(kind))


def _unwrapped(values: Any) -> Any:
    """Return lists with tensors as lists with arrays, which NumPy can stack."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, list | tuple):
        return [_unwrapped(value) for value in values]
    return values
