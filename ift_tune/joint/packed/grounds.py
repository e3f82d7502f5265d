"""What the problems of a pack's members need not share: data, buffers and frozen weights.

A comparison's seeds have splits of their own. Those of several seeds are laid end to end, and a
member's batches are rows of the whole; a buffer that differs is stacked as the weights are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ift_tune.joint.packed.walks import Course, require_batches, rows
from ift_tune.joint.start_check import StartCheck
from ift_tune.problem.batches import Batch, Batches, map_batch, tensors_of
from ift_tune.problem.problem import BilevelProblem


class Ground:
    """What a problem has beside its weights and λ.

    Attributes:
        data: The loaders of its splits.
        constants: Buffers and frozen weights of its modules, by name.
        checked: What the check at the start has found of the first run that stands on it.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        """Look at a problem.

        Raises:
            UsageError: If one of its loaders does not tell which rows come next.
        """
        require_batches(problem.splits)
        self.checked: StartCheck | None = None
        self.data: dict[str, Batches] = {
            name: loader for name, loader in vars(problem.splits).items() if loader is not None
        }
        self.constants: dict[str, Tensor] = {}
        for owner, module in (("model", problem.model), ("hyper", problem.hyper)):
            held = [*module.named_buffers(), *module.named_parameters()]
            trained = {id(p) for p in module.parameters() if p.requires_grad}
            self.constants |= {f"{owner}.{n}": t for n, t in held if id(t) not in trained}
        self._tensors = {
            f"Splits.{name}": tensors_of(loader.tensors) for name, loader in self.data.items()
        }

    def difference(self, other: Ground) -> str | None:
        """Return the name of something that has other values there; None if nothing has.

        Args:
            other: Of a problem of the same form.
        """
        for name, tensors in self._tensors.items():
            for one, theirs in zip(tensors, other._tensors[name], strict=True):
                if not torch.equal(one, theirs):
                    return name
        for name, tensor in self.constants.items():
            if not torch.equal(tensor, other.constants[name]):
                return name
        return None

    def form(self) -> dict[str, object]:
        """Return by name what problems must have in common to be packed, whatever the values."""
        found: dict[str, object] = {
            f"Splits.{name}": (loader.size, loader.batch_size, loader.shuffle)
            for name, loader in self.data.items()
        }
        found |= {
            f"{name}'s tensors": [(tuple(t.shape), t.dtype) for t in tensors]
            for name, tensors in self._tensors.items()
        }
        return found | {n: (tuple(t.shape), t.dtype) for n, t in self.constants.items()}


class Standing:
    """The grounds of some members, in their order.

    Attributes:
        constants: Those that are not the pack's own, by name, with an entry for each member.
    """

    def __init__(
        self,
        grounds: Sequence[Ground],
        constants: Mapping[str, Tensor],
        data: Mapping[str, Batches],
        places: Sequence[int],
    ) -> None:
        """Take what the members stand on.

        Args:
            grounds: Of each.
            constants: See the class.
            data: The loaders, one for all grounds.
            places: Which of its parts of equal size is each member's.
        """
        self._grounds, self.constants, self._data = grounds, constants, data
        self._places = torch.tensor(list(places))
        self._single = len(set(places)) == 1

    def course(self, split: str, places: Sequence[Sequence[Tensor]]) -> Course:
        """Return the batches of the members over many steps; those with more steps come first.

        Args:
            split: Of which split.
            places: Of each member, one for each of its steps.
        """
        own = self._grounds[0].data[split]
        if self._single:
            return Course(own, places)
        return Course(self._data[split], places, self._places * own.size)

    def offsets(self, split: str) -> Tensor | None:
        """Return where the rows of each member begin, on their device; None: all have the same."""
        if self._single:
            return None
        data = self._data[split]
        return (self._places * self._grounds[0].data[split].size).to(data.device)

    def loader(self, split: str, offset: Tensor | None) -> Batches:
        """Return the loader of the member whose rows begin at an offset of `offsets`."""
        own = self._grounds[0].data[split]
        return own if offset is None else _Part(self._data[split], own, offset)


class Grounds:
    """The different grounds of a pack, each once."""

    def __init__(self, own: Ground) -> None:
        """Take that of the pack's own problem."""
        self._own = own
        self._known: list[weakref.ref[Ground]] = [weakref.ref(own)]
        self._laid: list[Ground] = []  # end to end in `_data`
        self._data: dict[str, Batches] = {}

    def known(self, ground: Ground) -> Ground:
        """Return the one that has been met before, if an equal one has; it has the same form."""
        for other in self._alive():
            if other.difference(ground) is None:
                return other
        self._known.append(weakref.ref(ground))
        return ground

    def of(self, grounds: Sequence[Ground]) -> Standing:
        """Return what members stand on.

        Args:
            grounds: Of each, from `known`.
        """
        different = list({id(g): g for g in grounds}.values())
        moved = dict.fromkeys(name for ground in different for name in self._changed(ground))
        constants = {name: torch.stack([g.constants[name] for g in grounds]) for name in moved}
        if len(different) == 1:
            return Standing(grounds, constants, different[0].data, [0] * len(grounds))
        if any(ground not in self._laid for ground in different):
            self._lay()
        places = {id(ground): place for place, ground in enumerate(self._laid)}
        return Standing(grounds, constants, self._data, [places[id(g)] for g in grounds])

    def _changed(self, ground: Ground) -> list[str]:
        """Return which constants of a ground are not the pack's own."""
        if ground is self._own:
            return []
        own = self._own.constants
        return [n for n, tensor in ground.constants.items() if not torch.equal(tensor, own[n])]

    def _alive(self) -> Iterator[Ground]:
        return iter([g for ref in self._known if (g := ref()) is not None])

    def _lay(self) -> None:
        """Lay the data of all present grounds end to end: those of the past are let go."""
        self._laid = list(self._alive())
        self._known = [weakref.ref(ground) for ground in self._laid]
        self._data = {}
        for split, first in self._laid[0].data.items():
            columns = zip(*(tensors_of(g.data[split].tensors) for g in self._laid), strict=True)
            ends = iter([torch.cat(tensors) for tensors in columns])
            joined = map_batch(partial(_next_of, ends), first.tensors)
            # A size even where all rows are one batch, which are a part of these.
            size = first.batch_size or first.size
            self._data[split] = Batches(*joined, batch_size=size, shuffle=first.shuffle)


def _next_of(parts: Iterator[Tensor], _tensor: Tensor) -> Tensor:
    return next(parts)


class _Part(Batches):
    """The part of a loader that is one member's, for measuring: its rows begin at an offset."""

    def __init__(self, whole: Batches, own: Batches, offset: Tensor) -> None:
        self._whole, self._own, self._offset = whole, own, offset

    def in_order(self) -> Iterator[Batch]:
        """Yield all rows in their order, the last batch smaller where it must be."""
        size = self._own.batch_size or self._own.size
        numbers = torch.arange(self._own.size, device=self._whole.device)
        for places in torch.split(numbers, size):
            yield rows(self._whole, places + self._offset)
