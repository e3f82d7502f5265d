"""A weight for each source of the training data: in what proportions to mix them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError
from ift_tune.base.views import Histogram, View
from ift_tune.hyper.answers import as_positions
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.capped_softmax import capped_softmax
from ift_tune.hyper.named_state import NamedState
from ift_tune.hyper.pictures import quantiles
from ift_tune.hyper.sources import (
    Start,
    answers_of,
    bounds_of,
    inverse_of,
    numbered,
    shared,
    start_of,
)
from ift_tune.hyper.weighing import times

_FEW = 12  # sources that are named one by one


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
            table, found = numbered(sources, names)
            sizes = None if answers is None else answers_of(answers, len(table))
            counts = torch.bincount(table, weights=sizes, minlength=len(found)).double()
        elif shares is not None and sources is None:
            if answers is not None:
                raise UsageError(
                    "answers must be left out where `shares` are given: let the shares be of "
                    f"answers, got {shown(answers)}"
                )
            found, counts = shared(shares, names)
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
        bounds = bounds_of(n, found, floor, max_repetition)
        self._bounds = {"floors": bounds[0].tolist(), "caps": (bounds[0] + bounds[1]).tolist()}
        self.capped = max_repetition is not None
        # Not saved with λ: they are arguments, and the next process has them from there.
        for name, tensor in zip(("shares", "floors", "rooms"), (n, *bounds), strict=True):
            self.register_buffer(name, tensor.to(given), persistent=False)
        table = table if table is None else table.to(given.device)
        self.register_buffer("table", table, persistent=False)
        self.raw = nn.Parameter(inverse_of(start_of(init, n, found, bounds), *bounds).to(given))

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
        start = start_of(proportions, n, self.names, (bounds[0], bounds[1]))
        self.raw.copy_(inverse_of(start, *bounds))

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
        return times(losses, self.weights()[sources], self)

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
