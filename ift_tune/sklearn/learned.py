"""What an estimator's hyperparameters have become: arrays by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ift_tune.hyper import Compose, HyperKind


class Learned(Mapping[str, npt.NDArray[Any]]):
    """Learned hyperparameters by name, after their transforms; a mapping that cannot be changed.

    A kind with one array has it under its own name, others under ``kind.part``.

    Example:
        >>> from torch import nn
        >>> import ift_tune
        >>> from ift_tune.sklearn.learned import Learned
        >>> decay = ift_tune.WeightDecay(nn.Linear(4, 1), "input", init=0.5)
        >>> found = Learned({"features": decay})
        >>> found
        Learned:
          features.weight  (4,)  min 0.5, median 0.5, max 0.5
          features.bias    ()    0.5
        >>> found["features.weight"]
        array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """

    def __init__(self, kinds: Mapping[str, HyperKind]) -> None:
        """Read the kinds."""
        self._arrays = {
            key: array for name, kind in kinds.items() for key, array in _arrays(name, kind)
        }

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return an array."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Return how many arrays there are."""
        return len(self._arrays)

    def __repr__(self) -> str:
        """Show a line for each array."""
        names = max(map(len, self), default=0)
        shapes = max((len(str(array.shape)) for array in self.values()), default=0)
        lines = [
            f"  {name:<{names}}  {array.shape!s:<{shapes}}  {_words(array)}"
            for name, array in self.items()
        ]
        return "\n".join(["Learned:", *lines])


def _arrays(name: str, kind: HyperKind) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if isinstance(kind, Compose):
        for part in kind.kinds:
            yield from _arrays(f"{name}.{part}", kind[part])
        return
    learned = kind.learned()
    for part, array in learned.items():
        values = array.detach().cpu().numpy().squeeze().copy()
        values.setflags(write=False)
        yield name if len(learned) == 1 else f"{name}.{part}", values


def _words(array: npt.NDArray[Any]) -> str:
    if array.size == 1:
        return f"{array.item():.3g}"
    if array.size <= 3:
        return ", ".join(f"{value:.3g}" for value in array.ravel())
    low, middle, high = np.quantile(array, [0.0, 0.5, 1.0])
    return f"min {low:.3g}, median {middle:.3g}, max {high:.3g}"
