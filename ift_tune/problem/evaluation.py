"""Numbers of a split: its batches on a device, what is measured on each, and their means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import is_stacked
from ift_tune.problem.batches import Batch, Loader, to_device
from ift_tune.problem.loaders import once_through

T = TypeVar("T")


class SplitBatches:
    """The batches of a split on a device, counted; each iteration is a pass of its own.

    Attributes:
        examples: In the largest pass so far.
    """

    def __init__(
        self,
        name: str,
        loader: Loader,
        device: torch.device,
        size: Callable[[Batch], float],
    ) -> None:
        """Take the split; `size` tells the number of examples of a batch."""
        self._name, self._loader, self._device, self._size = name, loader, device, size
        self.examples: float = 0

    def __iter__(self) -> Iterator[Batch]:
        """Start a pass that disturbs no other.

        Raises:
            UsageError: If the split is empty.
        """
        examples: float = 0
        batch = None
        for batch in once_through(self._loader):
            examples += self._size(batch)
            self.examples = max(self.examples, examples)
            yield to_device(batch, self._device)
        if batch is None:
            raise UsageError(f"the {self._name} loader yields no batch")


def measured(evaluate: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
    """Return what a problem measures, without graphs where it can do without.

    Losses that differentiate the model by its inputs (physics-informed nets, forces from energies,
    gradient penalties) cannot: they are measured with them.

    Raises:
        UsageError: If what is returned is no number.
    """
    return as_numbers(without_graphs(evaluate), "evaluate")


def without_graphs(evaluate: Callable[[], T]) -> T:
    """Return what is measured, without graphs where it can do without."""
    try:
        with torch.no_grad():
            return evaluate()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return evaluate()


def mean_metrics(
    metrics: Callable[[Batch], Mapping[str, Any]],
    weight: Callable[[Batch], float | Tensor],
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Return the means of what `metrics` measures on each batch, weighted by `weight`.

    Objects with `update`, `compute` and `reset`, as torchmetrics has them, are not averaged: what
    `metrics` has updated is reset before the first batch, and computed once after the last.

    Args:
        metrics: Of a batch.
        weight: Of a batch; one of weight 0 is left out, for a mean over nothing is NaN.
        batches: Of a split.

    Returns:
        Nothing if all batches have weight 0.

    Raises:
        UsageError: If a metric is no number, or not measured on every batch.
    """
    return begin_means(metrics, weight, batches).read()


def begin_means(
    metrics: Callable[[Batch], Mapping[str, Any]],
    weight: Callable[[Batch], float | Tensor],
    batches: Iterable[Batch],
) -> Later[dict[str, float]]:
    """Return the same as `mean_metrics`, with its numbers unread: no batch waits for a device."""
    found: dict[str, list[Tensor | float]] = {}
    shares: list[Tensor | float] = []
    objects: dict[str, Any] = {}
    names: set[str] | None = None
    try:
        for batch in batches:
            share = weight(batch)
            if not isinstance(share, Tensor) and share == 0:
                continue
            values = _mapping(metrics(batch), "metrics")
            if names is None:
                names = set(values)
                objects = {name: value for name, value in values.items() if _accumulates(value)}
                if objects:  # they may hold what a loss, or an earlier look, has counted
                    _reset(objects)
                    values = metrics(batch)
            if set(values) != names:
                raise UsageError(
                    "metrics(batch) must return the same names for every batch, so that all means "
                    f"are over the same examples; got {sorted(names)} and then {sorted(values)}"
                )
            for name, value in values.items():
                if name not in objects:
                    found.setdefault(name, []).append(_unread(name, value))
            shares.append(share)
        computed = as_numbers(objects, "metrics")
    finally:
        _reset(objects)
    # Multiplied and added once they are read: no batch asks the device for more than its metrics.
    every = [shares, *found.values()]

    def means(numbers: list[float]) -> dict[str, float]:
        known = iter(numbers)
        weights, *columns = [
            [next(known) if isinstance(x, Tensor) else x for x in column] for column in every
        ]
        whole = sum(weights)
        if whole == 0:
            return {}
        sums = [sum(x * w for x, w in zip(column, weights, strict=True) if w) for column in columns]
        return {n: x / whole for n, x in zip(found, sums, strict=True)} | computed

    return Later([x for column in every for x in column if isinstance(x, Tensor)], means)


def _unread(name: str, value: Any) -> Tensor | float:
    """Return a metric as a number, or as the tensor of one entry that it is on a device."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_cpu:
        return value
    return _number(name, value, "metrics")


def as_numbers(values: Any, method: str) -> dict[str, float]:
    """Return what `metrics` or `evaluate` has returned as plain numbers.

    Objects with `update`, `compute` and `reset` are computed and reset; where one computes several
    numbers, the names of both are joined.

    Args:
        values: What the user's method returned.
        method: Its name, for the errors.

    Raises:
        UsageError: If it is not a mapping of names to numbers.

    Example:
        >>> import torch
        >>> as_numbers({"error": torch.tensor(0.25)}, "metrics")
        {'error': 0.25}
        >>> as_numbers({"recall": torch.tensor([0.5, 1.0])}, "metrics")
        Traceback (most recent call last):
            ...
        ift_tune.base.errors.UsageError: metrics must return one number for 'recall': take its ...
    """
    found: dict[str, float] = {}
    for name, value in _mapping(values, method).items():
        if _accumulates(value):
            computed = value.compute()
            value.reset()
            if isinstance(computed, Mapping):
                joined = {f"{name}_{key}": entry for key, entry in computed.items()}
                found |= as_numbers(joined, method)
                continue
            value = computed
        found[name] = _number(name, value, method)
    return found


def _mapping(values: Any, method: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise UsageError(
            f'{method} must return a dict of names and numbers, such as {{"loss": loss}}, got '
            f"{'None' if values is None else 'a ' + type(values).__name__}"
        )
    for name in values:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise UsageError(f"{method} must name each number by a text of one line, got {name!r}")
    return values


def _number(name: str, value: Any, method: str) -> float:
    single = value.numel() == 1 if isinstance(value, Tensor) else getattr(value, "size", 1) == 1
    if isinstance(value, Tensor | np.ndarray | np.generic) and single:
        if isinstance(value, Tensor) and is_stacked(value):  # a number for each of several trials
            stack: Any = value.reshape(()).double()
            return stack  # type: ignore[no-any-return]
        value = value.item()
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor | np.ndarray):
        shape = f"shape {tuple(value.shape)}"
        raise UsageError(
            f"{method} must return one number for {name!r}: take its mean, or give each entry a "
            f"name of its own; got {shape}"
        )
    raise UsageError(
        f"{method} must return one real number for {name!r}; leave out what was not measured; got "
        f"{'None' if value is None else 'a ' + type(value).__name__}"
    )


def _accumulates(value: Any) -> bool:
    """Return whether a value is a torchmetrics object, or has its methods."""
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


def _reset(objects: Mapping[str, Any]) -> None:
    for value in objects.values():
        value.reset()
