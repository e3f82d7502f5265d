"""Images in parquet, in the Hugging Face layout: ``img: {bytes, path}`` and ``label``."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ift_tune.errors import MissingDependencyError


@lru_cache(maxsize=2)  # decoding takes seconds, and every trial of a search builds its problem
def read_images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return all images of the files ``{split}-*.parquet``.

    Args:
        folder: Where the files lie.
        split: ``"train"`` or ``"test"``.

    Returns:
        Pixels, shape (N, 3, H, W), uint8, and class numbers, shape (N,).

    Raises:
        FileNotFoundError: If there is no such file.
        MissingDependencyError: If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "coded images are read with Pillow: pip install 'ift_tune[vision]'"
        ) from error
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}-*.parquet in {folder}")
    pixels: list[Any] = []
    labels: list[int] = []
    for file in files:
        table = pq.read_table(file, columns=["img", "label"])
        for image in table.column("img").to_pylist():
            with Image.open(io.BytesIO(image["bytes"])) as picture:
                pixels.append(np.asarray(picture.convert("RGB")))
        labels += table.column("label").to_pylist()
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels)
