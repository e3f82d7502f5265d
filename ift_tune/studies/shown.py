"""What training examples look like, as data: pictures, texts, or rows of features."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ift_tune.base.randomness import RandomStream
from ift_tune.hyper.predictions import positions
from ift_tune.hyper.supervised import SupervisedProblem
from ift_tune.problem.loaders import once_through
from ift_tune.problem.outputs import batch_parts
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.symptoms import curvature_split

Look: TypeAlias = "dict[str, str]"
"""What an example looks like: ``{"image": PNG as base64}`` or ``{"text": ...}``."""

_FEATURES = 16  # of a row, the first of which are shown
_TOKENS = 400
_COLOURS = (1, 3)  # channels of a picture


def shown(problem: BilevelProblem, chosen: Sequence[int]) -> dict[int, Look]:
    """Return what some training examples look like, by position, in the order given.

    Batches of pictures (B, C, H, W) are pictures, and so are rows of pixels where the problem has
    an attribute ``image_shape``, (C, H, W). Strings are texts, and so are rows of tokens, in the
    words of the problem's ``decode(tokens)`` where it has one. What else there is is a row of
    features.

    Args:
        problem: Whose training split it is.
        chosen: Positions.
    """
    device, wanted = problem.weights()[0].device, set(chosen)
    found: dict[int, Any] = {}
    with RandomStream(0, device).aside():
        for batch in once_through(getattr(problem.splits, curvature_split(problem))):
            inputs = _inputs(problem, batch)
            for row, index in enumerate(positions(problem, batch).tolist()):
                if index in wanted:
                    found[index] = _row(inputs, row)
            if len(found) == len(wanted):
                break
    found = {index: found[index] for index in chosen if index in found}
    pixels = {i: p for i, v in found.items() if (p := _pixels(problem, v)) is not None}
    if pixels and len(pixels) == len(found):
        # One scale for all of them, so that they can be compared.
        low = min(float(p.min()) for p in pixels.values())
        high = max(float(p.max()) for p in pixels.values())
        return {i: {"image": _as_png((p - low) / ((high - low) or 1.0))} for i, p in pixels.items()}
    return {i: {"text": _as_text(problem, value)} for i, value in found.items()}


def _inputs(problem: BilevelProblem, batch: Any) -> Any:
    if isinstance(problem, SupervisedProblem):
        return problem.batch_parts(batch).inputs
    return batch_parts(batch, type(problem).__name__).inputs


def _row(inputs: Any, row: int) -> Any:
    """Return one example's part of a batch's inputs."""
    if isinstance(inputs, Mapping):
        return {key: _row(value, row) for key, value in inputs.items()}
    if isinstance(inputs, Tensor):
        return inputs[row].detach().cpu().clone()
    return inputs[row] if isinstance(inputs, Sequence) else inputs


def _pixels(problem: BilevelProblem, value: Any) -> npt.NDArray[np.float64] | None:
    """Return an example as (H, W, 3); None if it is no picture."""
    if isinstance(value, Mapping) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, Tensor):
        return None
    shape = getattr(problem, "image_shape", None)
    if value.ndim == 1 and shape is not None and math.prod(shape) == len(value):
        value = value.reshape(tuple(shape))
    if value.ndim != 3 or value.shape[0] not in _COLOURS:
        return None
    pixels = value.double().nan_to_num().numpy()
    return np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)


def _as_png(shares: npt.NDArray[np.float64]) -> str:
    """Return a picture (H, W, 3) with values from 0 to 1 as a PNG file, as base64."""
    pixels = (255.0 * shares.clip(0.0, 1.0)).round().astype(np.uint8)
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # each without a filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of each of three colours
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def _as_text(problem: BilevelProblem, value: Any) -> str:
    """Return an example in words or numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_as_text(problem, entry)}" for key, entry in value.items())
    if not isinstance(value, Tensor):
        return str(value)
    decode = getattr(problem, "decode", None)
    if not value.is_floating_point() and value.ndim == 1 and callable(decode):
        return str(decode(value))
    if not value.is_floating_point():
        return _listed(value.flatten().tolist(), _TOKENS, str)
    return _listed(value.flatten().tolist(), _FEATURES, lambda number: f"{number:.4g}")


def _listed(values: Sequence[Any], most: int, write: Any) -> str:
    rest = len(values) - most
    words = " ".join(write(value) for value in values[:most])
    return f"{words} ... ({rest:,} more)" if rest > 0 else words
