"""What `DomainWeights` is told of the sources: their names, shares, bounds, and where p starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ift_tune.base.arguments import plain, require_list, shown
from ift_tune.base.errors import UsageError, require_number

_LEAST_ROOM = 1e-5  # of a cap above 1; below that, bounds in float32 leave none

Start: TypeAlias = Literal["proportional", "uniform"] | Mapping[str, float] | Sequence[float]
"""Proportions to start from: the data's own, equal ones, or one for each source."""


def numbered(
    sources: Tensor | Sequence[int] | Sequence[str], names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the number of each example's source, and the names.

    Raises:
        UsageError: If they are neither numbers nor names, or have gaps.
    """
    if isinstance(sources, str | bytes) or not isinstance(sources, Iterable):
        raise UsageError(
            "sources must be numbers from 0, or names, one for each training example: give a list "
            f"or a tensor, got {shown(sources)}"
        )
    if not isinstance(sources, Tensor):
        given = [str(source) for source in sources if isinstance(source, str)]
        if given and len(given) == len(sources):
            known = _distinct(sorted(set(given)) if names is None else names)
            places = {name: i for i, name in enumerate(known)}
            if missing := set(given) - set(places):
                raise UsageError(f"names must have every source, got none for {min(missing)!r}")
            return torch.tensor([places[source] for source in given]), known
        try:
            sources = torch.as_tensor(list(sources))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                "sources must be numbers, or all names, one for each training example, got "
                f"{shown(sources)}"
            ) from error
    whole = not sources.is_floating_point() and not sources.is_complex()
    if not whole or sources.dtype is torch.bool or sources.ndim != 1 or not sources.numel():
        raise UsageError(
            "sources must be integers from 0, or names, one for each training example: give shape "
            f"(examples,), got {sources.dtype} of shape {tuple(sources.shape)}"
        )
    table = sources.detach().cpu().long()
    low, high = int(table.min()), int(table.max())
    number = high + 1 if names is None else len(names)
    if low < 0 or high >= number:
        raise UsageError(
            f"sources must be numbered from 0 to {number - 1}, one for each of the names: got "
            f"{low} to {high}"
        )
    if number > len(table):
        raise UsageError(
            f"sources must be numbered without gaps: number them from 0, got {high} for "
            f"{len(table)} training examples"
        )
    return table, _distinct(_numbers(number) if names is None else names)


def answers_of(answers: Tensor | Sequence[int], examples: int) -> Tensor:
    """Return how many answers of each example count, in double precision, on the CPU.

    Raises:
        UsageError: If there is no number for each example.
    """
    given = answers.tolist() if isinstance(answers, Tensor) else answers
    listed = require_list("answers", given, "numbers, one for each training example")
    found = _numbers_of("answers", listed, "training example")
    if len(found) != examples or not bool((found.isfinite() & (found >= 0.0)).all()):
        raise UsageError(
            f"answers must be numbers of at least 0 for each of the {examples} training examples, "
            f"got {shown(answers)}"
        )
    return found


def shared(
    shares: Mapping[str, float] | Sequence[float], names: Sequence[str] | None
) -> tuple[tuple[str, ...], Tensor]:
    """Return the names of sources that batches tell, and their shares.

    Raises:
        UsageError: If they are not as many.
    """
    if isinstance(shares, Mapping):
        if names is not None:
            raise UsageError(f"names must be left out where shares have them, got {list(names)}")
        values, names = list(shares.values()), list(shares)
    else:
        values = require_list("shares", shares, "a share for each source")
        names = _numbers(len(values)) if names is None else names
    found = _distinct(names)
    if len(found) != len(values):
        raise UsageError(f"names must be {len(values)}, one for each share, got {len(found)}")
    return found, _numbers_of("shares", values)


def _numbers_of(what: str, values: Iterable[object], of: str = "source") -> Tensor:
    """Return numbers in double precision.

    Raises:
        UsageError: If one is none.
    """
    found = list(values)
    try:
        return torch.tensor([float(plain(value)) for value in found], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} must be a number for each {of}, got {shown(found)}") from error


def _numbers(count: int) -> list[str]:
    return [f"source_{k}" for k in range(count)]


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of at least two sources."""
    if isinstance(names, str):
        raise UsageError(f"names must be a name for each source, got the one {names!r}")
    found = tuple(names)
    lines = all(isinstance(n, str) and n.strip() == n != "" and "\n" not in n for n in found)
    if not lines or len(set(found)) < len(found):
        raise UsageError(f"names must be different lines of text, got {list(found)}")
    if len(found) < 2:
        raise UsageError(f"there must be at least 2 sources to weigh, got {len(found)}")
    return found


def bounds_of(
    n: Tensor, names: tuple[str, ...], floor: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the floor of each source, and how far above it p can be.

    Raises:
        UsageError: If they are out of range, or leave no room.
    """
    require_number("floor", floor, least=0.0)
    if floor >= 1.0 / len(n):
        raise UsageError(
            f"floor must be at least 0 and below 1/{len(n)}, one over the number of sources, got "
            f"{floor}"
        )
    floors = torch.full_like(n, floor)
    if cap is None:
        return floors, torch.full_like(n, torch.inf)
    require_number("max_repetition", cap, above=0.0)
    if cap < 1.0 + _LEAST_ROOM:
        raise UsageError(
            "max_repetition must be clearly above 1, where every weight would be 1, or None, got "
            f"{cap}"
        )
    rooms = cap * n - floors
    least = int(rooms.argmin())
    if float(rooms[least]) <= 0.0:
        raise UsageError(
            f"floor must be below max_repetition times the share of each source, for "
            f"{names[least]!r} {cap * float(n[least]):.3g}: lower floor or raise max_repetition, "
            f"got floor {floor} and max_repetition {cap}"
        )
    return floors, rooms


def start_of(
    init: Start, n: Tensor, names: tuple[str, ...], bounds: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the proportions to start from, in double precision.

    Raises:
        UsageError: If they are no proportions, or outside of the bounds.
    """
    if isinstance(init, str):
        if init not in ("proportional", "uniform"):
            raise UsageError(f"init must be 'proportional', 'uniform' or proportions, got {init!r}")
        values = n if init == "proportional" else torch.full_like(n, 1.0 / len(n))
    else:
        if isinstance(init, Mapping):
            if set(init) != set(names):
                raise UsageError(
                    f"init must have a share for each of {list(names)}, got {dict(init)}"
                )
            init = [init[name] for name in names]
        values = _numbers_of("init", require_list("init", init, "proportions"))
        if len(values) != len(n) or not abs(float(values.sum()) - 1.0) < 1e-6:
            raise UsageError(
                f"init must be {len(n)} proportions that sum to 1, got {values.tolist()}"
            )
        values = values / values.sum()
    floors, rooms = bounds
    outside = ~((values > floors) & (values < floors + rooms))
    if bool(outside.any()):
        k = int(outside.int().argmax())
        most = min(1.0, float(floors[k] + rooms[k]))
        raise UsageError(
            f"init must start every source between floor and cap, {names[k]!r} above "
            f"{float(floors[k]):.3g} and below {most:.3g}: give other proportions or bounds, got "
            f"{float(values[k]):.3g}"
        )
    return values


def inverse_of(p: Tensor, floors: Tensor, rooms: Tensor) -> Tensor:
    """Return the λ whose proportions are p, with t = 0."""
    share = p - floors
    return share.log() - torch.log1p(-share / rooms)
