"""The data sets of the tasks: embedded ones, and MNIST, CIFAR-10 and text where they are found."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ift_tune.base.arguments import expanded
from ift_tune.base.errors import DataNotFoundError, UsageError, nearest, require

if TYPE_CHECKING:  # why not always, is said in `base`
    from torch import Tensor

    from ift_tune.tasks.texts import Texts

DATA_VARIABLE = "IFT_TUNE_DATA"
MNIST_SHAPE = (1, 28, 28)
CIFAR10_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Images:
    """A data set of images.

    Attributes:
        pixels: Shape (N, C, H, W), uint8.
        targets: Class numbers, shape (N,), int64.
        test_pixels: The data set's own test part, shape (M, C, H, W); M = 0 where it has none.
        test_targets: Shape (M,).
        white: The value of the brightest pixel.
    """

    pixels: Tensor
    targets: Tensor
    test_pixels: Tensor
    test_targets: Tensor
    white: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def train(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return images of the main part, (n, C, H, W) in [−1, 1], and their classes."""
        return self._scaled(self.pixels[index]), self.targets[index]

    def test(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return images of the test part likewise."""
        return self._scaled(self.test_pixels[index]), self.test_targets[index]

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.float() / (self.white / 2.0) - 1.0


@dataclass(frozen=True)
class Tabular:
    """A data set for regression or classification, its columns with mean 0 and variance 1.

    Attributes:
        inputs: Shape (N, columns), float32.
        targets: Shape (N,), float32 and likewise of mean 0 and variance 1; or class numbers, int64.
        names: Of the columns; empty if they have none.
    """

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...] = ()

    def part(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return some rows, (n, columns), and their targets."""
        return self.inputs[index], self.targets[index]


def diabetes() -> Tabular:
    """Return scikit-learn's diabetes: 442 patients, 10 measurements, progression a year later."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    return Tabular(_standardised(found.data), _standardised(found.target))


def breast_cancer() -> Tabular:
    """Return scikit-learn's breast cancer: 30 measurements of 569 cells, malignant or benign."""
    import torch
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    targets = torch.from_numpy(found.target.astype("int64"))
    names = tuple(str(name) for name in found.feature_names)
    return Tabular(_standardised(found.data), targets, names)


def _standardised(columns: object) -> Tensor:
    import torch

    values = torch.as_tensor(columns, dtype=torch.float64)
    scaled = (values - values.mean(dim=0)) / values.std(dim=0, correction=0)
    return scaled.to(torch.float32)


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        characters: Positions in `alphabet`, shape (N,), int64.
        alphabet: The characters that occur, sorted.
    """

    characters: Tensor
    alphabet: str

    @classmethod
    def of(cls, text: str) -> Text:
        """Number the characters of a text."""
        import torch

        alphabet = "".join(sorted(set(text)))
        places = {character: i for i, character in enumerate(alphabet)}
        return cls(torch.tensor([places[character] for character in text]), alphabet)


@lru_cache(maxsize=1)  # reading takes longer than a small trial's steps, and every trial reads
def digits() -> Images:
    """Return scikit-learn's digits: 1,797 real images of 8×8 pixels, 16 shades."""
    import torch
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype("uint8"))[:, None]
    targets = torch.from_numpy(found.target.astype("int64"))
    return Images(pixels, targets, pixels[:0], targets[:0], white=16)


def digits_as(shape: tuple[int, int, int]) -> Images:
    """Return the digits enlarged to `shape` (channels, height, width), every channel the same."""
    from torch.nn import functional as F

    channels, height, width = shape
    small = digits()
    large = F.interpolate(small.pixels.float(), size=(height, width), mode="bilinear")
    pixels = (large * (255 / small.white)).round().byte().repeat(1, channels, 1, 1)
    return Images(pixels, small.targets, pixels[:0], small.targets[:0])


def descriptions() -> str:
    """Return some tens of thousands of characters of English: what describes its data sets."""
    from sklearn import datasets

    loaders = (
        datasets.load_digits,
        datasets.load_diabetes,
        datasets.load_iris,
        datasets.load_wine,
        datasets.load_breast_cancer,
        datasets.load_linnerud,
    )
    return "\n".join(load().DESCR for load in loaders)


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
    image_module = require("PIL.Image", extra="vision", what="reading coded images with Pillow")
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}-*.parquet in {folder}")
    pixels: list[Any] = []
    labels: list[int] = []
    for file in files:
        table = pq.read_table(file, columns=["img", "label"])
        for image in table.column("img").to_pylist():
            with image_module.open(io.BytesIO(image["bytes"])) as picture:
                pixels.append(np.asarray(picture.convert("RGB")))
        labels += table.column("label").to_pylist()
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels)


@dataclass(frozen=True)
class DataSet:
    """How to get a data set.

    Attributes:
        stand_in: Embedded data of the same form, for trying a task out without any files; of a
            data set that is embedded itself, all there is.
        read: ``read(root, download)`` reads it from the data root; None if it is embedded.
        layout: What has to lie under the data root; empty if nothing.

    Example:
        >>> from ift_tune.tasks import DataSet
        >>> from ift_tune.tasks.datasets import digits
        >>> scans = DataSet(digits, lambda root, download: read_my_scans(root), "scans/*.png")
        >>> scans.stand_in().shape  # what a task is tried out on by ``--embedded``
        (1, 8, 8)
    """

    stand_in: Callable[[], Any]
    read: Callable[[Path, bool], Any] | None = None
    layout: str = ""


def load(
    name: str,
    *,
    source: DataSet | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    embedded: bool = False,
) -> Any:
    """Return a data set: `Images`, `Text`, `Texts` or `Tabular`, or what a task's own source gives.

    Args:
        name: One of `DATA_SETS`, unless there is a source.
        source: How to get it, for a data set that is not one of these.
        root: Folder that holds it; default: the environment's IFT_TUNE_DATA.
        download: Whether torchvision may fetch what is missing into `root`.
        embedded: Take its stand-in, for which nothing is read.

    Raises:
        DataNotFoundError: If the data is not there; the message says both ways to get it.
        UsageError: If there is no such data set.
    """
    if source is None:
        if name not in DATA_SETS:
            raise UsageError(f"there is no data set {name!r}{nearest(name, DATA_SETS)}")
        source = DATA_SETS[name]
    if embedded or source.read is None:
        return source.stand_in()
    root = root or os.environ.get(DATA_VARIABLE)
    mends = (
        f"pass --data-root DIR (or set {DATA_VARIABLE}) with {source.layout}, add --download "
        "where torchvision has it, or try --embedded"
    )
    if root is None:
        raise DataNotFoundError(f"{name}: no data root given; {mends}")
    try:
        return source.read(expanded(root), download)
    except (FileNotFoundError, RuntimeError) as error:  # torchvision raises the latter
        raise DataNotFoundError(f"{name} is not under {root}; {mends} ({error})") from error


def _mnist(root: Path, download: bool) -> Images:
    from ift_tune.tasks.vision import torchvision_part

    def part(train: bool) -> tuple[Tensor, Tensor]:
        found = torchvision_part("datasets").MNIST(str(root), train=train, download=download)
        return found.data[:, None], found.targets.long()

    return Images(*part(True), *part(False))


def _cifar10(root: Path, download: bool) -> Images:
    """Read Hugging Face's parquet, or torchvision's layout where there is none."""
    folder = root / "cifar10"
    if any(folder.glob("*.parquet")):
        return Images(*read_images(folder, "train"), *read_images(folder, "test"))
    import torch

    from ift_tune.tasks.vision import torchvision_part

    def part(train: bool) -> tuple[Tensor, Tensor]:
        found = torchvision_part("datasets").CIFAR10(str(root), train=train, download=download)
        return torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets)

    return Images(*part(True), *part(False))


def _shakespeare(root: Path, _download: bool) -> Text:
    return Text.of(_read_shakespeare(root))


def _read_shakespeare(root: Path) -> str:
    return (root / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")


def _mixture(root: Path | None, _download: bool) -> Texts:
    """Return the texts that come with Python and scikit-learn, and Shakespeare from a root."""
    from ift_tune.tasks.texts import Texts, library_texts

    texts = library_texts() | {"descriptions": descriptions()}
    return Texts.of(texts if root is None else texts | {"shakespeare": _read_shakespeare(root)})


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(digits),
    "diabetes": DataSet(diabetes),
    "mnist": DataSet(
        lambda: digits_as(MNIST_SHAPE), _mnist, "DIR/MNIST/raw in torchvision's layout"
    ),
    "cifar10": DataSet(
        lambda: digits_as(CIFAR10_SHAPE),
        _cifar10,
        "DIR/cifar10/{train,test}-*.parquet in the Hugging Face layout, or torchvision's layout",
    ),
    "shakespeare": DataSet(
        lambda: Text.of(descriptions()), _shakespeare, "DIR/text/tinyshakespeare.txt"
    ),
    "texts": DataSet(lambda: _mixture(None, False), _mixture, "DIR/text/tinyshakespeare.txt"),
    "breast-cancer": DataSet(breast_cancer),
}
"""Every data set by name."""
