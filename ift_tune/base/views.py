"""What hyperparameters look like, as data: drawn by the report, kept in the run directory.

The numbers are NumPy arrays, so that a report is made without PyTorch.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np

from ift_tune.base.files import parse_json, signed_json

VIEWS_FILE = "views.json"
"""Where a trial's folder keeps them."""

_VIEWS = "views"

Numbers: TypeAlias = Any
"""A NumPy array; a tensor that is given instead is copied into one.

`Any`, as Python's types have no field that takes more than it holds.
"""


@dataclass(frozen=True)
class ImageGrid:
    """Images side by side.

    Attributes:
        title: What they are.
        images: Shape (N, C, H, W), C = 1 or 3.
        columns: Images in a row.
        captions: One for each image, or none at all.
        low: The value drawn black.
        high: The value drawn white.
    """

    title: str
    images: Numbers
    columns: int = 10
    captions: tuple[str, ...] = ()
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _array(self.images))

    def shares(self) -> Numbers:
        """Return the images with pixels from 0, `low`, to 1, `high`."""
        return ((self.images - self.low) / ((self.high - self.low) or 1.0)).clip(0.0, 1.0)


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers with a colour bar.

    Attributes:
        title: What they are.
        values: Shape (rows, columns).
        rows: What a row is.
        columns: What a column is.
        log: Whether colours go by factors.
        shape: Of the matrix that was, where `values` are means over blocks of it; the axes count
            its rows and columns.
    """

    title: str
    values: Numbers
    rows: str = ""
    columns: str = ""
    log: bool = False
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _array(self.values))


@dataclass(frozen=True)
class Histogram:
    """How numbers are distributed, in one or more groups.

    Attributes:
        title: What is counted.
        values: The numbers of each group, any shape, by its name.
        axis: What the numbers are.
        log: Whether the axis is logarithmic; the numbers must then be positive.
    """

    title: str
    values: Mapping[str, Numbers] = field(default_factory=dict)
    axis: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        arrays = {name: _array(values) for name, values in self.values.items()}
        object.__setattr__(self, "values", arrays)


View: TypeAlias = ImageGrid | HeatMap | Histogram
"""One picture."""

_KINDS: dict[str, type[View]] = {kind.__name__: kind for kind in (ImageGrid, HeatMap, Histogram)}


def _array(numbers: Any) -> np.ndarray[Any, Any]:
    """Return a copy as an array, so that a view stays as it was while λ goes on."""
    if hasattr(numbers, "detach"):  # a tensor, told by its method: PyTorch need not be there
        numbers = numbers.detach().cpu().numpy()
    return np.array(numbers)


def pack(views: Sequence[View]) -> bytes:
    """Return views as JSON: numbers as base64 of float32, pixels of one of 256 shades."""
    plain = [
        {"kind": type(view).__name__}
        | {f.name: _plain(getattr(view, f.name)) for f in fields(view)}
        for view in map(_shaded, views)
    ]
    return signed_json({_VIEWS: plain})


def unpack(content: bytes | str) -> list[View]:
    """Return what `pack` packed; a view of a kind that is not known here is left out.

    Raises:
        ValueError: If it is damaged.
    """
    first = content[:1]
    # Those of before there was a digest are a list.
    plains = json.loads(content) if first in (b"[", "[") else parse_json(content)[_VIEWS]
    views = [
        _KINDS[plain["kind"]](**{k: _whole(v) for k, v in plain.items() if k != "kind"})
        for plain in plains
        if plain["kind"] in _KINDS
    ]
    return [_unshaded(view) for view in views]


def _shaded(view: View) -> View:
    """Return images with pixels from 0, `low`, to 255, `high`."""
    if not isinstance(view, ImageGrid):
        return view
    # A λ that has diverged may hold NaN, which no whole number stands for: black.
    shades = np.nan_to_num(255.0 * view.shares()).round()
    return replace(view, images=shades.astype(np.uint8))


def _unshaded(view: View) -> View:
    # Those of before 256 shades are floats already.
    if not isinstance(view, ImageGrid) or view.images.dtype != np.uint8:
        return view
    shares = view.images.astype(np.float32) / 255.0
    return replace(view, images=view.low + shares * (view.high - view.low))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        numbers = value.astype("u1" if value.dtype == np.uint8 else "<f4")
        return {
            "shape": list(value.shape),
            "dtype": numbers.dtype.str,
            "data": base64.b64encode(numbers.tobytes()).decode(),
        }
    if isinstance(value, Mapping):
        return {"groups": {name: _plain(entry) for name, entry in value.items()}}
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if "groups" in value:
        return {name: _whole(entry) for name, entry in value["groups"].items()}
    numbers = np.frombuffer(base64.b64decode(value["data"]), dtype=value.get("dtype", "<f4"))
    return numbers.reshape(value["shape"])
