"""Batches that tell which examples they are made of, whatever collates them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import data

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError
from ift_tune.problem.batches import INDEX, Batch

SOURCE = "source"
"""The entry of an example that holds the number of its source."""


class IndexedDataset(data.Dataset[Any]):
    """A dataset whose examples tell their positions in it, and their sources if they have some.

    Of a training split: a `torch.utils.data.Subset` is wrapped, not what it is a part of. Examples
    are mappings, which get entries ``"index"`` and ``"source"``, or pairs ``(inputs, targets)``,
    which get the position as a third entry.

    Example:
        >>> import ift_tune
        >>> texts = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
        >>> ift_tune.IndexedDataset(texts, sources=[0, 1])[1]
        {'input_ids': [3], 'index': 1, 'source': 1}
        >>> ift_tune.IndexedDataset([(0.5, 1), (0.7, 0)])[1]
        (0.7, 0, 1)
    """

    def __init__(self, dataset: Any, sources: Sequence[int] | None = None) -> None:
        """Take a dataset with a length.

        Args:
            dataset: Of mappings or pairs, with ``len()`` and ``[position]``.
            sources: The number of each example's source, from 0.

        Raises:
            UsageError: If it has no length, or the sources are not one for each example.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UsageError(
                "an IndexedDataset must be made of a dataset with a length and positions: of a "
                f"stream, number the examples where they are made, got {shown(dataset)}"
            )
        if sources is not None and len(sources) != len(dataset):
            raise UsageError(
                f"sources must be one for each of {len(dataset)} examples, got {len(sources)}"
            )
        self.dataset, self.sources = dataset, sources

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        """Return an example with its position.

        Raises:
            UsageError: If it is neither a mapping nor a pair.
        """
        place = range(len(self))[position]  # of a negative one, the one that is meant
        example = self.dataset[place]
        if isinstance(example, Mapping):
            source = {} if self.sources is None else {SOURCE: _whole(SOURCE, self.sources[place])}
            return {**example, INDEX: place, **source}
        if isinstance(example, tuple) and len(example) == 2 and self.sources is None:
            return (*example, place)
        raise UsageError(
            "the examples of an IndexedDataset must be mappings, or pairs where there are no "
            f"sources: make them so, got a {type(example).__name__}"
        )


class IndexedCollator:
    """A collate function that adds ``"index"`` to the batches of another.

    For a `DataLoader` of examples that are mappings, beside any collate function that makes
    mappings of them, such as those of transformers. That one never sees the positions and the
    sources of the examples, which it might refuse, pad or drop.

    Where batches are to tell sources in the place of positions, as ``DomainWeights(shares=...)``
    asks, it is made with ``entry="source"``.

    Example:
        >>> import torch, ift_tune
        >>> texts = [{"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([3, 4])}]
        >>> collate = ift_tune.IndexedCollator()
        >>> loader = torch.utils.data.DataLoader(
        ...     ift_tune.IndexedDataset(texts, sources=[5, 7]), batch_size=2, collate_fn=collate
        ... )
        >>> [batch["index"] for batch in loader]
        [tensor([0, 1])]
        >>> examples = [loader.dataset[1]]
        >>> ift_tune.IndexedCollator(entry="source")(examples)
        {'ids': tensor([[3, 4]]), 'index': tensor([7])}
    """

    def __init__(
        self, collate_fn: Callable[[list[Any]], Any] | None = None, *, entry: str = INDEX
    ) -> None:
        """Wrap a collate function.

        Args:
            collate_fn: Makes a mapping of a list of mappings; None for PyTorch's own.
            entry: Which entry of the examples the batches tell: ``"index"``, ``"source"``, or
                another name.

        Raises:
            UsageError: If it is no function, or `entry` no name.
        """
        if collate_fn is not None and not callable(collate_fn):
            raise UsageError(f"collate_fn must be a function, got {shown(collate_fn)}")
        if not isinstance(entry, str) or not entry:
            raise UsageError(f"entry must be the name of an entry, got {shown(entry)}")
        self.collate_fn = data.default_collate if collate_fn is None else collate_fn
        self.entry = entry

    def __call__(self, examples: list[Any]) -> Batch:
        """Return the batch with an entry ``"index"``, shape (B,), int64.

        Raises:
            UsageError: If an example does not tell its position, or the batch is no mapping.
        """
        numbers, others = [], []
        for example in examples:
            if not isinstance(example, Mapping) or self.entry not in example:
                found = list(example) if isinstance(example, Mapping) else type(example).__name__
                raise UsageError(
                    f"examples must have an entry {self.entry!r}: wrap the dataset in "
                    f"ift_tune.IndexedDataset, got {found}"
                )
            numbers.append(_whole(self.entry, example[self.entry]))
            hidden = (self.entry, INDEX, SOURCE)
            others.append({key: value for key, value in example.items() if key not in hidden})
        batch: Any = self.collate_fn(others)
        if not hasattr(batch, "__setitem__") or not hasattr(batch, "keys"):
            raise UsageError(
                "the collate function must return a mapping, in which an index has a place, got a "
                f"{type(batch).__name__}"
            )
        batch[INDEX] = torch.tensor(numbers, dtype=torch.int64)
        return batch


def _whole(name: str, value: Any) -> int:
    """Return a position or the number of a source.

    Raises:
        UsageError: If it is no whole number.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise UsageError(
            f"the {name} of an example must be a whole number, counted from 0: number names, got "
            f"{shown(value)}"
        ) from error
