"""Features of a frozen part of a model, computed once for all that is trained on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import data

from ift_tune.base.arguments import require_instance
from ift_tune.base.errors import UsageError, require_integer
from ift_tune.problem.batches import INDEX, Batch, Batches, Loader, tensors_of
from ift_tune.problem.frozen_part import FrozenPart
from ift_tune.problem.outputs import Parts, batch_parts
from ift_tune.problem.problem import Splits

_ROWS = 256  # at once, where nobody says


def cached_features(
    backbone: nn.Module,
    splits: Splits,
    batch_size: int | None = None,
    *,
    name: str = "features",
    keep: Sequence[str] = (),
) -> Splits:
    """Run a frozen part of a model once over all splits; return splits of what it returns.

    A problem on them trains the rest of the model alone: `BilevelProblem.model` is then what takes
    the features. Batches are in the order of the loaders that were given, and have their targets
    and indices.

    Args:
        backbone: The frozen part, on the device where it is to run: a module that returns one
            tensor (B, ...). In evaluation mode, where modes matter to it; its parameters without
            ``requires_grad``.
        splits: Of its inputs. The loaders are `Batches`, lists of batches, or a `DataLoader` of a
            dataset with a length, whose examples are what they are at the first pass: augmentation
            that is drawn anew each time would be frozen.
        batch_size: Examples that it is given at once; None for what a loader has, or 256.
        name: Of the features, where batches have names: the argument of the model on top.
        keep: Names of other entries of such batches that the model on top takes, such as
            ``"attention_mask"``.

    Returns:
        Splits whose inputs are features, on the device where the inputs were.

    Raises:
        UsageError: If something in the backbone trains, is random, or looks at other examples of a
            batch; if what it returns is not one tensor; or if a loader cannot be read once.

    Example:
        >>> import torch, ift_tune
        >>> rows = torch.randn(40, 8), torch.arange(40) % 2
        >>> splits = ift_tune.Splits.from_arrays(*rows, batch_size=10)
        >>> backbone = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Dropout(0.1))
        >>> ift_tune.cached_features(backbone, splits)
        Traceback (most recent call last):
        ift_tune.base.errors.UsageError: the backbone must be frozen ...
        >>> _ = backbone.requires_grad_(False).eval()
        >>> features = ift_tune.cached_features(backbone, splits)
        >>> [inputs.shape for inputs, _ in features.train][:1]
        [torch.Size([10, 3])]
    """
    require_instance("backbone", backbone, nn.Module, "a module that returns features")
    require_instance("splits", splits, Splits, "the Splits of its inputs")
    if batch_size is not None:
        require_integer("batch_size", batch_size, 1)
    keep = [keep] if isinstance(keep, str) else list(keep)
    caching = _Caching(FrozenPart(backbone), name, keep)
    found: dict[int, Any] = {}  # one loader may be several splits
    for field in fields(splits):
        loader = getattr(splits, field.name)
        if loader is not None and id(loader) not in found:
            found[id(loader)] = caching.loader(field.name, loader, batch_size)
    made: Any = {f.name: found.get(id(getattr(splits, f.name))) for f in fields(splits)}
    return Splits(**made)


@dataclass(frozen=True)
class _Caching:
    """Makes loaders of features.

    Attributes:
        part: The frozen part.
        name: Of the features.
        keep: Other entries that are kept.
    """

    part: FrozenPart
    name: str
    keep: Sequence[str]

    def loader(self, split: str, loader: Loader, batch_size: int | None) -> Loader:
        """Return a loader of features in the place of one of inputs.

        Raises:
            UsageError: If it cannot be read by position.
        """
        if isinstance(loader, Batches):
            rows = Batches(*loader.tensors, batch_size=min(batch_size or _ROWS, loader.size))
            columns = self.columns(rows.in_order(), loader.device)
            cached = Batches(*columns.whole(), batch_size=loader.batch_size, shuffle=loader.shuffle)
            cached.generator.set_state(loader.generator.get_state())
            return cached
        if type(loader) in (list, tuple):
            return [self.columns([batch]).batch() for batch in loader]
        if (
            isinstance(loader, data.DataLoader)
            and loader.batch_sampler is not None
            and not isinstance(loader.dataset, data.IterableDataset)
        ):
            every = data.DataLoader(
                loader.dataset,
                batch_size=batch_size or loader.batch_size or _ROWS,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
            )
            return data.DataLoader(
                _Rows(self.columns(every)),
                batch_sampler=loader.batch_sampler,
                collate_fn=_as_it_is,
                generator=loader.generator,
            )
        raise UsageError(
            f"Splits.{split} must be read by position for its features to be kept: give Batches, "
            "a list of batches, or a DataLoader of a dataset with a length and with a batch_size, "
            f"got a {type(loader).__name__}"
        )

    def columns(self, batches: Iterable[Batch], device: torch.device | None = None) -> _Columns:
        """Return all features with what belongs to them.

        Args:
            batches: Of inputs.
            device: Where to; None for that of each batch.

        Raises:
            UsageError: If there is nothing, or what there is has no common shape.
        """
        parts: list[dict[str, Tensor]] = []
        named = False
        for batch in batches:
            pieces = batch_parts(batch, "problem on features")
            named = pieces.labels is not None
            place = device or next((t.device for t in tensors_of(batch)), torch.device("cpu"))
            parts.append({k: v.to(place) for k, v in self._of(pieces).items()})
        if not parts:
            raise UsageError("a split must have batches for its features to be kept, got none")
        whole = {}
        for key in parts[0]:
            pieces_of = [part[key] for part in parts]
            if len({tuple(piece.shape[1:]) for piece in pieces_of}) > 1:
                shapes = sorted({tuple(piece.shape[1:]) for piece in pieces_of})
                raise UsageError(
                    f"the {key} of all examples must have one shape to be kept: pad all examples "
                    f"to one length, got {shapes[0]} and {shapes[-1]}"
                )
            whole[key] = torch.cat(pieces_of)
        return _Columns(whole, named)

    def _of(self, parts: Parts) -> dict[str, Tensor]:
        """Return the features of a batch, its targets, and what is kept of it."""
        features = self.part.features(parts.inputs)
        found = {self.name: features}
        if parts.labels is None:
            if parts.targets is not None:
                found["targets"] = parts.targets
        else:
            found |= parts.labels
            if missing := [key for key in self.keep if key not in parts.inputs]:
                raise UsageError(
                    f"keep must name entries of the batches, got {missing[0]!r}, and there are "
                    f"{', '.join(map(str, parts.inputs))}"
                )
            found |= {key: parts.inputs[key] for key in self.keep}
        if parts.index is not None:
            found[INDEX] = parts.index
        odd = [k for k, v in found.items() if len(v) != len(features)]
        if odd:
            raise UsageError(
                f"the backbone must return a row for each example, got {len(features)} rows and "
                f"{len(found[odd[0]])} {odd[0]}"
            )
        return found


@dataclass(frozen=True)
class _Columns:
    """Features and what belongs to them, as tensors with a row for each example."""

    parts: Mapping[str, Tensor]
    named: bool

    def batch(self, take: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Batch:
        """Return a batch of rows in the form of the loader's."""
        rows = {name: take(part) for name, part in self.parts.items()}
        return rows if self.named else tuple(rows.values())

    def whole(self) -> Iterator[Any]:
        """Yield what `Batches` takes."""
        yield from [dict(self.parts)] if self.named else self.parts.values()


class _Rows(data.Dataset[Any]):
    """Rows in memory, of which a whole batch is taken at once."""

    def __init__(self, columns: _Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.parts.values())))

    def __getitem__(self, place: int) -> Batch:
        return self._columns.batch(lambda tensor: tensor[place])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """Return rows as a batch: what PyTorch's loaders ask for where they can."""
        return self._columns.batch(lambda tensor: tensor[list(places)])


def _as_it_is(batch: Batch) -> Batch:
    return batch
