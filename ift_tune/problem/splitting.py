"""Disjoint splits of arrays: how many rows each has, which ones, and their loaders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.arguments import plain, require_flag, require_seed, shown, whole
from ift_tune.base.errors import UsageError, require_integer
from ift_tune.problem.arrays import as_rows
from ift_tune.problem.batches import INDEX, LABELS, Batches

PARTS = ("train", "val", "search", "test")

Sizes: TypeAlias = Sequence[float | None] | Mapping[str, float | None]
"""Of each of `PARTS`: a fraction below 1, a count, or None for what is left over."""


def split_loaders(
    arrays: Sequence[Any],
    *,
    sizes: Sizes,
    seed: int,
    stratify: Any,
    batch_size: int | Mapping[str, int | None] | None,
    index: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, Batches]:
    """Return the loaders of `Splits.from_arrays` by their names."""
    require_flag("index", index)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a model's, such as torch.float32, got {shown(dtype)}")
    seed = require_seed(seed)
    columns = _converted(arrays, dtype, device)
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths or len(set(lengths.values())) > 1:
        raise UsageError(
            "arrays must have one row for each example, the same number in all, got "
            f"{', '.join(f'{n} in {name}' for name, n in lengths.items()) or 'no array'}"
        )
    rows = next(iter(lengths.values()))
    labels = _labels(arrays, columns, stratify)
    if labels is not None and len(labels) != rows:
        raise UsageError(f"stratify must have a class for each of {rows} rows, got {len(labels)}")
    chosen = drawn(counts(sizes, rows), rows, seed, labels)
    by_split = _batch_sizes(batch_size)
    return {
        name: Batches(
            *_parts(arrays, columns, place, index=index and name == "train"),
            batch_size=_at_most(by_split.get(name), len(place)),
            seed=seed + number,
            shuffle=name in ("train", "val"),
        )
        for number, (name, place) in enumerate(zip(PARTS, chosen, strict=True))
    }


def _converted(
    arrays: Sequence[Any], dtype: torch.dtype, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Return every array as a tensor, by a name for errors."""
    columns = {}
    for number, array in enumerate(arrays, start=1):
        name = f"array {number}"
        if isinstance(array, Mapping):
            for key, entry in array.items():
                columns[f"{name}[{key!r}]"] = as_rows(entry, f"{name}[{key!r}]", dtype, device)
        else:
            columns[name] = as_rows(array, name, dtype, device)
    return columns


def _parts(
    arrays: Sequence[Any], columns: Mapping[str, Tensor], place: Tensor, *, index: bool
) -> list[Any]:
    """Return the rows of one split, in the form of the arrays."""
    parts: list[Any] = []
    for number, array in enumerate(arrays, start=1):
        name = f"array {number}"
        if isinstance(array, Mapping):
            parts.append({k: _rows(columns[f"{name}[{k!r}]"], place) for k in array})
        else:
            parts.append(_rows(columns[name], place))
    if index:
        position = torch.arange(len(place), device=next(iter(columns.values())).device)
        if len(parts) == 1 and isinstance(parts[0], dict):
            parts[0][INDEX] = position
        else:
            parts.append(position)
    return parts


def _rows(column: Tensor, place: Tensor) -> Tensor:
    return column[place.to(column.device)]


def _labels(arrays: Sequence[Any], columns: Mapping[str, Tensor], stratify: Any) -> Tensor | None:
    """Return what the splits are stratified by.

    Raises:
        UsageError: If it is no column of classes.
    """
    if stratify is None or stratify is False:
        return None
    if stratify is not True:
        try:
            values = np.unique(np.asarray(stratify), return_inverse=True)[1]
        except TypeError as error:  # of several types
            raise UsageError(
                f"stratify must be true, false or an array of classes, got {shown(stratify)}"
            ) from error
        found = torch.as_tensor(values)
    else:
        name, last = f"array {len(arrays)}", arrays[-1]
        if isinstance(last, Mapping):
            known = [key for key in LABELS if key in last]
            if not known:
                raise UsageError(
                    f"stratify must be told the classes: name an entry {LABELS[0]!r}, or give "
                    f"stratify an array of them, got {', '.join(map(str, last))}"
                )
            name = f"{name}[{known[0]!r}]"
        found = columns[name]
    whole = not found.is_floating_point() or bool((found == found.round()).all())
    if found.ndim != 1 or not whole:
        raise UsageError(
            "stratify must be told one class for each row: leave it out, or give it an array of "
            f"classes, got {found.dtype} of shape {tuple(found.shape)}"
        )
    return found


def _batch_sizes(given: Any) -> dict[str, int]:
    """Return the batch sizes by split; a split that is left out is one batch."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(PARTS, given)
    if strangers := set(by_name) - set(PARTS):
        raise UsageError(
            f"batch_size must be a number, or numbers by {', '.join(PARTS)}, got "
            f"{', '.join(sorted(map(str, strangers)))}"
        )
    found = {name: whole(size) for name, size in by_name.items() if size is not None}
    for size in found.values():
        require_integer("batch_size", size, 1)
    return found


def _at_most(size: int | None, rows: int) -> int | None:
    """Return a batch size for a split; None for all rows at once."""
    return None if size is None or size > rows else size


def counts(sizes: Sizes, rows: int) -> list[int]:
    """Return the number of rows of each split.

    Fractions are of all rows, rounded so that all of them together lose none.

    Raises:
        UsageError: If they are not four numbers above 0, more than there are rows, or a split
            would be empty.

    Example:
        >>> counts((0.5, 0.25, 0.125, 0.125), 16), counts({"val": 5, "search": 3, "test": 2}, 16)
        ([8, 4, 2, 2], [6, 5, 3, 2])
    """
    form = "sizes must be four fractions or counts, of train, val, search and test"
    if isinstance(sizes, Mapping):
        if strangers := set(sizes) - set(PARTS):
            raise UsageError(f"{form}, got {', '.join(sorted(map(str, strangers)))}")
        given = [sizes.get(name) for name in PARTS]
    elif isinstance(sizes, str) or not hasattr(sizes, "__len__") or len(sizes) != len(PARTS):
        raise UsageError(f"{form}, got {shown(sizes)}")
    else:
        given = list(sizes)
    wanted = [None if size is None else _size(plain(size), form) for size in given]
    if wanted.count(None) > 1:
        raise UsageError(f"{form}, one of which may be None for what is left, got {shown(sizes)}")
    found = [0.0 if size is None else size * rows if size < 1 else size for size in wanted]
    if sum(found) > rows * (1 + 1e-9):
        raise UsageError(
            f"sizes must not sum to more than there are rows, {rows}, got {shown(sizes)}"
        )
    if None in wanted:
        found[wanted.index(None)] = rows - sum(found)
    ends = [round(sum(found[: place + 1]) + 1e-9) for place in range(len(found))]
    sized = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if min(sized) < 1:
        named = ", ".join(f"{name} {n}" for name, n in zip(PARTS, sized, strict=True))
        raise UsageError(
            f"each split must have at least one row: give larger sizes or more data, got {named}"
        )
    return sized


def _size(size: Any, form: str) -> float:
    right = isinstance(size, Real) and not isinstance(size, bool) and math.isfinite(size)
    if not right or size <= 0 or (size > 1 and size != int(size)):
        raise UsageError(f"{form}, below 1 or whole numbers, got {shown(size)}")
    return float(size)


def drawn(sized: Sequence[int], rows: int, seed: int, labels: Tensor | None) -> list[Tensor]:
    """Return the rows of each split, drawn without replacement.

    Args:
        sized: Of each.
        rows: There are.
        seed: Of the draw.
        labels: Whose values each split has in the proportions of all rows; None for any.

    Raises:
        UsageError: If some label has fewer rows than there are splits.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    if labels is None:
        return list(torch.split(order[: sum(sized)], list(sized)))
    classes, number, total = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    if int(total.min()) < len(sized):
        rare = total.argmin()
        raise UsageError(
            f"stratify must find each class in {len(sized)} splits: join rare classes, leave them "
            f"out, or leave stratify out, got {int(total[rare])} rows of class {classes[rare]}"
        )
    heaps = [order[number[order] == k] for k in range(len(classes))]
    found = []
    for size in sized:
        left = torch.tensor([len(heap) for heap in heaps])
        taken = _shares(left, size, generator)
        rest = [torch.split(heap, [n, len(heap) - n]) for heap, n in zip(heaps, taken, strict=True)]
        heaps = [other for _, other in rest]
        part = torch.cat([own for own, _ in rest])
        found.append(part[torch.randperm(len(part), generator=generator)])
    return found


def _shares(left: Tensor, size: int, generator: torch.Generator) -> list[int]:
    """Return how many of each class make up `size`, in proportion to those that are left."""
    exact = left.double() * (size / int(left.sum()))
    taken = (exact + 1e-9).floor()
    missing = size - int(taken.sum())
    # Ties at random: else the first classes would have the larger half in every split.
    tie = torch.rand(len(left), generator=generator, dtype=torch.float64)
    rest = torch.where(taken < left, (exact - taken).clamp(min=0.0) + 1e-6 * tie, -1.0)
    taken[rest.argsort(descending=True)[:missing]] += 1
    return [int(n) for n in taken]
