"""The data sets of the tasks: embedded digits, and MNIST where it can be found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ift_tune.errors import DataNotFoundError

DATA_VARIABLE = "IFT_TUNE_DATA"


@dataclass(frozen=True)
class Images:
    """Grey images as rows, pixels scaled to [−1, 1], and their class numbers.

    Attributes:
        inputs: Shape (N, pixels), float32.
        targets: Shape (N,), int64.
        test_inputs: The data set's own test part, shape (M, pixels); M = 0 where it has none.
        test_targets: Shape (M,).
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def load(name: str, *, root: str | os.PathLike[str] | None, download: bool) -> Images:
    """Return a data set.

    Args:
        name: ``"digits"`` (embedded, nothing is read from `root`) or ``"mnist"``.
        root: Folder that holds ``MNIST/raw``; default: the environment's IFT_TUNE_DATA.
        download: Whether torchvision may fetch what is missing into `root`.

    Raises:
        DataNotFoundError: If the data is not there; the message says both ways to get it.
    """
    return _LOADERS[name](root or os.environ.get(DATA_VARIABLE), download)


def _digits(_root: str | os.PathLike[str] | None, _download: bool) -> Images:
    from sklearn.datasets import load_digits  # takes a second to import: only when used

    digits = load_digits()
    inputs = torch.from_numpy(digits.data.astype(np.float32)) / 8.0 - 1.0
    targets = torch.from_numpy(digits.target.astype(np.int64))
    return Images(inputs, targets, inputs[:0], targets[:0])


def _mnist(root: str | os.PathLike[str] | None, download: bool) -> Images:
    from ift_tune.tasks.vision import torchvision_datasets

    mends = (
        f"pass --data-root DIR (or set {DATA_VARIABLE}) with DIR/MNIST/raw in torchvision's layout"
    )
    if root is None:
        raise DataNotFoundError(f"MNIST: no data root given; {mends}, or add --download")
    parts = []
    for train in (True, False):
        try:
            part = torchvision_datasets().MNIST(str(Path(root)), train=train, download=download)
        except RuntimeError as error:
            raise DataNotFoundError(
                f"MNIST is not under {root}; {mends}, or add --download ({error})"
            ) from error
        parts.append((part.data.flatten(1).float() / 127.5 - 1.0, part.targets.long()))
    return Images(*parts[0], *parts[1])


_LOADERS: dict[str, Callable[[str | os.PathLike[str] | None, bool], Images]] = {
    "digits": _digits,
    "mnist": _mnist,
}
