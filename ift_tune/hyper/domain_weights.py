"""A weight for each source of the training data: in what proportions to mix them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import plain, require_list, shown
from ift_tune.base.errors import UsageError, require_number
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.answers import as_positions
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.capped_softmax import capped_softmax
from ift_tune.hyper.named_state import NamedState
from ift_tune.hyper.pictures import quantiles

_FEW = 12  # sources that are named one by one
_LEAST_ROOM = 1e-5  # of a cap above 1; below that, bounds in float32 leave none

Start: TypeAlias = Literal["proportional", "uniform"] | Mapping[str, float] | Sequence[float]
"""Proportions to start from: the data's own, equal ones, or one for each source."""


class DomainWeights(NamedState, HyperKind):
    """The loss of an example of source d is multiplied by p_d/n_d, p = softmax(λ) with bounds.

    n_d is the share of source d in the training data, p_d the share that it should have had. Over
    the whole split the training loss is Σ_d p_d·L_d, L_d the mean loss of source d: that of
    sampling the sources in the proportions p, as DoReMi (Xie et al. 2023) and DoGE (Fan et al.
    2024) learn them. With p = n all weights are 1; with p = 1/K all sources count the same.

    Shares are of answers that count, which the loss is a mean over: of the tokens of texts and not
    of the texts, where sources have texts of different lengths. Those are told by `answers` or
    `shares`. With shares of examples a_d instead, the loss is Σ_d p_d·(n_d/a_d)·L_d.

    The weights have the mean 1 over the split, Σ_d n_d·(p_d/n_d) = 1, and are not normalised in a
    batch again: its loss stays a mean over its examples, so that micro-batches and the shares of
    several processes add up to it exactly.

    Of K sources, p_d = f + (1 − K·f)·softmax(λ)_d with the floor f. A cap r on repetition keeps
    each example's weight p_d/n_d below r: in one pass over the data it counts less than r times
    (Muennighoff et al. 2023 find that text repeated up to 4 times is worth almost as much as new
    text). Then p_d = f + a_d·sigmoid(λ_d − log a_d + t) with a_d = r·n_d − f, and t such that
    Σ p_d = 1: the same softmax where the cap is far away. It is approached and never reached, so
    that no source loses its gradient there.

    Example:
        >>> import torch, ift_tune
        >>> sources = ["code", "web", "web", "web"]  # of each training example
        >>> kind = ift_tune.DomainWeights(sources, init={"code": 0.5, "web": 0.5})
        >>> kind.weigh(torch.ones(2), index=torch.tensor([0, 3])).detach()
        tensor([2.0000, 0.6667])
        >>> kind.words()
        'domain weights: code 0.5 (2 times its share), web 0.5 (0.667 times its share)'
    """

    name: ClassVar[str] = "domain_weights"
    floors: Tensor
    rooms: Tensor
    shares: Tensor
    table: Tensor | None

    def __init__(
        self,
        sources: Tensor | Sequence[int] | Sequence[str] | None = None,
        *,
        shares: Mapping[str, float] | Sequence[float] | None = None,
        answers: Tensor | Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        floor: float = 0.0,
        max_repetition: float | None = None,
        init: Start = "proportional",
        like: Tensor | None = None,
    ) -> None:
        """Make one raw parameter per source.

        Args:
            sources: The source of each training example, in the order of the split: a number from
                0, or a name. The loader yields each example's position, (inputs, targets, index).
            shares: Instead of `sources`, where the loader yields each example's source in the
                place of the index, (inputs, targets, source), or as the entry "index" by name: the
                share of every source among the answers that count of what it draws, such as tokens
                (of the examples where each has as many), or their numbers; with their names, or in
                order.
            answers: Beside `sources`, how many answers of each training example count, such as
                the tokens of its text. None: all have as many.
            names: Of numbered sources, for what is shown.
            floor: The least that p_d can be, from 0 to below 1/K.
            max_repetition: r, above 1: what p_d/n_d stays below; None for no cap.
            init: Where p starts, inside the bounds.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these, or the bounds leave no room.
        """
        super().__init__()
        table: Tensor | None = None
        if sources is not None and shares is None:
            table, found = _numbered(sources, names)
            sizes = None if answers is None else _sizes(answers, len(table))
            counts = torch.bincount(table, weights=sizes, minlength=len(found)).double()
        elif shares is not None and sources is None:
            if answers is not None:
                raise UsageError(
                    "answers must be left out where `shares` are given: let the shares be of "
                    f"answers, got {shown(answers)}"
                )
            found, counts = _shared(shares, names)
        else:
            raise UsageError(
                "DomainWeights must know each example's source: give `sources`, one for each "
                "training example, or `shares`, where the batches tell the source, got "
                f"{'neither' if sources is None else 'both'}"
            )
        for name, n in zip(found, counts.tolist(), strict=True):
            if not (math.isfinite(n) and n > 0.0):
                raise UsageError(
                    f"every source must have examples that count: leave out source {name!r}, "
                    f"got a share of {n:g}"
                )
        self.names = found
        self.assumes_equal_answers = table is not None and answers is None
        given = torch.empty(0) if like is None else like
        n = counts / counts.sum()
        bounds = _bounds(n, found, floor, max_repetition)
        self._bounds = {"floors": bounds[0].tolist(), "caps": (bounds[0] + bounds[1]).tolist()}
        self.capped = max_repetition is not None
        # Not saved with λ: they are arguments, and the next process has them from there.
        for name, tensor in zip(("shares", "floors", "rooms"), (n, *bounds), strict=True):
            self.register_buffer(name, tensor.to(given), persistent=False)
        table = table if table is None else table.to(given.device)
        self.register_buffer("table", table, persistent=False)
        self.raw = nn.Parameter(_inverse(_start(init, n, found, bounds), *bounds).to(given))

    def meaning(self) -> dict[str, list[Any]]:
        """Return the sources, and what bounds each p: the same λ has other p in other bounds."""
        return {"sources": list(self.names), **self._bounds}

    @torch.no_grad()
    def set_proportions(self, proportions: Start) -> None:
        """Set p: the data's own proportions, equal ones, or one for each source.

        Raises:
            UsageError: If they are not that, or lie outside of the bounds.

        Example:
            >>> import ift_tune
            >>> kind = ift_tune.DomainWeights(["code", "web", "web", "web"])
            >>> kind.set_proportions("uniform")
            >>> [round(p, 3) for p in kind().tolist()]
            [0.5, 0.5]
        """
        on_host = [t.double().cpu() for t in (self.shares, self.floors, self.rooms)]
        n, *bounds = on_host
        start = _start(proportions, n, self.names, (bounds[0], bounds[1]))
        self.raw.copy_(_inverse(start, *bounds))

    def forward(self) -> Tensor:
        """Return the proportions p, shape (sources,); they sum to 1."""
        free = 1.0 - self.floors.sum()
        if not self.capped:
            return self.floors + free * torch.softmax(self.raw, dim=0)
        # In double precision, where the device has it: logits that are far apart leave p what the
        # difference of two large numbers says.
        exact = self.raw.dtype if self.raw.device.type == "mps" else torch.float64
        floors, rooms = self.floors.to(exact), self.rooms.to(exact)
        above = capped_softmax(self.raw.to(exact), rooms, 1.0 - floors.sum())
        proportions: Tensor = (floors + above).to(self.raw.dtype)
        return proportions

    def weights(self) -> Tensor:
        """Return what the losses of each source are multiplied by, p_d/n_d, shape (sources,)."""
        proportions: Tensor = self()
        return proportions / self.shares

    @property
    def examples_known(self) -> int | None:
        """How many training examples have a source, where the batches tell positions."""
        return None if self.table is None else len(self.table)

    @property
    def takes_index(self) -> bool:
        """Whether the batches tell positions: where they tell sources, many examples have one."""
        return self.table is not None

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Multiply each loss by the weight of its example's source.

        Raises:
            UsageError: If the loader does not tell which examples, or which sources, or wrong ones.
        """
        third = "source" if self.table is None else "index"
        if index is None:
            raise UsageError(
                "domain weights need to know the source of each example: let the training loader "
                f"yield (inputs, targets, {third}), got no {third}"
            )
        if self.table is None:
            sources = as_positions(
                *(index, len(losses), len(self.raw), self),
                what="the third entry of a batch",
                count=f"there are {len(self.raw)} sources",
                mend="let the loader yield (inputs, targets, source), sources numbered from 0",
            )
        else:
            count = f"the sources of {len(self.table)} training examples are known"
            sources = self.table[
                as_positions(index, len(losses), len(self.table), self, count=count)
            ]
        return losses * self.weights()[sources]

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return a factor for each of a few sources, by which n_d is multiplied in the softmax.

        Without bounds, all 1 are the data's own proportions. Many sources have none.
        """
        if len(self.names) > _FEW:
            return {}
        factors = (self.raw.detach().double() - self.shares.double().log()).exp().tolist()
        return {
            name: CoarseParameter.near(0.1, 10.0, factor)
            for name, factor in zip(self.names, factors, strict=True)
        }

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Set every source's factor; their common scale does not matter."""
        if values:
            factors = torch.tensor([values[name] for name in self.names], dtype=torch.float64)
            self.raw.copy_(factors.to(self.shares).log() + self.shares.log())

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the proportion of each source."""
        return dict(zip(self.names, self().unbind(), strict=True))

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Return the proportions by source, or quantiles of many; and the largest weight."""
        proportions = self()
        named = len(self.names) <= _FEW
        found = (
            dict(zip(self.names, proportions.tolist(), strict=True))
            if named
            else quantiles(proportions)
        )
        return found | {"largest_repetition": float(self.weights().max())}

    @torch.no_grad()
    def words(self) -> str:
        """Return the sources in a sentence, the largest first; of many, the first few."""
        columns = [self().tolist(), self.weights().tolist(), self.names]
        rows: list[tuple[float, float, str]] = sorted(zip(*columns, strict=True))
        told = ", ".join(
            f"{name} {p:.3g} ({w:.3g} times its share)" for p, w, name in rows[::-1][:_FEW]
        )
        others = len(rows) - _FEW
        return f"domain weights: {told}" + (f", and {others} others" if others > 0 else "")

    @torch.no_grad()
    def views(self) -> list[View]:
        """Return how the weights of many sources are distributed; a few are in the summary."""
        if len(self.names) <= _FEW:
            return []
        return [Histogram("weights of the sources", {"all": self.weights().cpu()}, "weight", True)]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return three sources with a floor and a cap that acts."""
        sources = torch.arange(len(inputs)) % 4 % 3  # half of them are of the first
        return cls(sources, floor=0.05, max_repetition=1.5, like=next(model.parameters()))


def _numbered(
    sources: Tensor | Sequence[int] | Sequence[str], names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the number of each example's source, and the names."""
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


def _sizes(answers: Tensor | Sequence[int], examples: int) -> Tensor:
    """Return how many answers of each example count, in double precision, on the CPU."""
    given = answers.tolist() if isinstance(answers, Tensor) else answers
    listed = require_list("answers", given, "numbers, one for each training example")
    found = _numbers_of("answers", listed, "training example")
    if len(found) != examples or not bool((found.isfinite() & (found >= 0.0)).all()):
        raise UsageError(
            f"answers must be numbers of at least 0 for each of the {examples} training examples, "
            f"got {shown(answers)}"
        )
    return found


def _shared(
    shares: Mapping[str, float] | Sequence[float], names: Sequence[str] | None
) -> tuple[tuple[str, ...], Tensor]:
    """Return the names of sources that batches tell, and their shares."""
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


def _bounds(
    n: Tensor, names: tuple[str, ...], floor: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the floor of each source, and how far above it p can be."""
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


def _start(init: Start, n: Tensor, names: tuple[str, ...], bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Return the proportions to start from, in double precision."""
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


def _inverse(p: Tensor, floors: Tensor, rooms: Tensor) -> Tensor:
    """Return the λ whose proportions are p, with t = 0."""
    share = p - floors
    return share.log() - torch.log1p(-share / rooms)
