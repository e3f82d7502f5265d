"""The data sets of the tasks: embedded ones, and MNIST, CIFAR-10 and text where they are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ift_tune.errors import DataNotFoundError, UsageError, nearest
from ift_tune.tasks.embedded import descriptions, digits, digits_as
from ift_tune.tasks.images import CIFAR10_SHAPE, MNIST_SHAPE, Images
from ift_tune.tasks.parquet import read_images
from ift_tune.tasks.tabular import diabetes
from ift_tune.tasks.text import Text

DATA_VARIABLE = "IFT_TUNE_DATA"


@dataclass(frozen=True)
class DataSet:
    """How to get a data set.

    Attributes:
        read: ``read(root, download)`` reads it from the data root.
        stand_in: The embedded data of the same form, for trying a task out without any files.
        layout: What has to lie under the data root; empty if nothing.
    """

    read: Callable[[Path, bool], Any]
    stand_in: Callable[[], Any]
    layout: str = ""


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    embedded: bool = False,
) -> Any:
    """Return a data set: `Images`, `Text` or `Tabular`.

    Args:
        name: One of `DATA_SETS`.
        root: Folder that holds it; default: the environment's IFT_TUNE_DATA.
        download: Whether torchvision may fetch what is missing into `root`.
        embedded: Take its stand-in, for which nothing is read.

    Raises:
        DataNotFoundError: If the data is not there; the message says both ways to get it.
        UsageError: If there is no such data set.
    """
    if name not in DATA_SETS:
        raise UsageError(f"there is no data set {name!r}{nearest(name, DATA_SETS)}")
    data_set = DATA_SETS[name]
    if embedded or not data_set.layout:
        return data_set.stand_in()
    root = root or os.environ.get(DATA_VARIABLE)
    mends = (
        f"pass --data-root DIR (or set {DATA_VARIABLE}) with {data_set.layout}, add --download "
        "where torchvision has it, or try --embedded"
    )
    if root is None:
        raise DataNotFoundError(f"{name}: no data root given; {mends}")
    try:
        return data_set.read(Path(root), download)
    except (FileNotFoundError, RuntimeError) as error:
        raise DataNotFoundError(f"{name} is not under {root}; {mends} ({error})") from error


def _mnist(root: Path, download: bool) -> Images:
    from ift_tune.tasks.vision import torchvision_part

    parts: list[Tensor] = []
    for train in (True, False):
        part = torchvision_part("datasets").MNIST(str(root), train=train, download=download)
        parts += [part.data[:, None], part.targets.long()]
    pixels, targets, test_pixels, test_targets = parts
    return Images(pixels, targets, test_pixels, test_targets)


def _cifar10(root: Path, download: bool) -> Images:
    """Read Hugging Face's parquet, or torchvision's layout where there is none."""
    folder = root / "cifar10"
    if any(folder.glob("*.parquet")):
        return Images(*read_images(folder, "train"), *read_images(folder, "test"))
    from ift_tune.tasks.vision import torchvision_part

    parts: list[Tensor] = []
    for train in (True, False):
        part = torchvision_part("datasets").CIFAR10(str(root), train=train, download=download)
        parts += [torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)]
    pixels, targets, test_pixels, test_targets = parts
    return Images(pixels, targets, test_pixels, test_targets)


def _shakespeare(root: Path, _download: bool) -> Text:
    return Text.of((root / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8"))


def _nothing(_root: Path, _download: bool) -> None:
    """Embedded data sets read no files."""


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(_nothing, digits),
    "diabetes": DataSet(_nothing, diabetes),
    "mnist": DataSet(
        _mnist, lambda: digits_as(MNIST_SHAPE), "DIR/MNIST/raw in torchvision's layout"
    ),
    "cifar10": DataSet(
        _cifar10,
        lambda: digits_as(CIFAR10_SHAPE),
        "DIR/cifar10/{train,test}-*.parquet in the Hugging Face layout, or torchvision's layout",
    ),
    "shakespeare": DataSet(
        _shakespeare, lambda: Text.of(descriptions()), "DIR/text/tinyshakespeare.txt"
    ),
}
"""Every data set by name."""
