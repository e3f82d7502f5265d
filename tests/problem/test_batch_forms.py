"""Batches of every form are mapped with all that they hold, and the loader's are left alone."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor

from ift_tune.problem.batches import map_batch, to_device
from ift_tune.problem.sizes import guess_batch_size


@attrs.define
class Attrs:
    x: Tensor
    y: Tensor
    note: dict[str, Any] = attrs.field(factory=lambda: {"text": "kept"})


@attrs.frozen
class Frozen:
    x: Tensor
    y: Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    y: Tensor
    note: Any = None


@dataclasses.dataclass
class Indexed:
    """A data class that looks like a mapping."""

    x: Tensor
    y: Tensor

    def keys(self) -> list[str]:
        return ["x", "y"]

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


class Named(NamedTuple):
    x: Tensor
    y: Tensor
    note: str = "kept"


class TensorDict:
    """No mapping, but with what a mapping's methods need."""

    def __init__(self, held: dict[str, Any]) -> None:
        self._held = held

    def keys(self) -> Any:
        return self._held.keys()

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._held[key] = value


class ReadOnly(Mapping[str, Any]):
    """A mapping that cannot be set, with a property of its own."""

    def __init__(self, held: dict[str, Any]) -> None:
        self._held = held

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def doubled(self) -> Tensor:
        doubled: Tensor = 2 * self["x"]
        return doubled


class Plain:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.note = x, y, ["kept"]


class PlainSlots:
    __slots__ = ("unset", "x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


MAKE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "attrs": Attrs,
    "frozen attrs": Frozen,
    "data class with slots": Slotted,
    "data class with items": Indexed,
    "named tuple": Named,
    "tensor dict": lambda x, y: TensorDict({"x": x, "y": y}),
    "read-only mapping": lambda x, y: ReadOnly({"x": x, "y": y}),
    "proxy": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "chain": lambda x, y: collections.ChainMap({"x": x}, {"y": y, "note": "kept"}),
    "user dict": lambda x, y: collections.UserDict(x=x, y=y),
    "default dict": lambda x, y: collections.defaultdict(list, x=x, y=y),
    "object": Plain,
    "object with slots": PlainSlots,
    "namespace": lambda x, y: types.SimpleNamespace(x=x, y=y, note="kept"),
    "nested": lambda x, y: types.SimpleNamespace(x=x, y=y, inner=[Attrs(x, y), {"k": (x,)}]),
}


def part(batch: Any, name: str) -> Any:
    return getattr(batch, name) if hasattr(batch, name) else batch[name]


@pytest.mark.parametrize("name", MAKE)
def test_every_tensor_is_mapped_and_the_rest_is_kept(name: str) -> None:
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    batch = MAKE[name](x, y)
    mapped = map_batch(lambda tensor: tensor + 1, batch)
    assert torch.equal(part(mapped, "x"), x + 1)
    assert torch.equal(part(mapped, "y"), y + 1)
    assert part(batch, "x") is x
    assert part(batch, "y") is y
    if name != "proxy":  # which nothing but a dict can stand in for
        assert type(mapped) is type(batch)
    if hasattr(batch, "note"):
        assert mapped.note == batch.note
    assert guess_batch_size(batch) == 3
    moved = to_device(batch, torch.device("meta"))
    assert part(moved, "x").is_meta
    assert part(batch, "x") is x


def test_a_read_only_mapping_keeps_its_properties() -> None:
    mapped = map_batch(lambda tensor: tensor + 1, ReadOnly({"x": torch.ones(2)}))
    assert mapped.doubled.tolist() == [4.0, 4.0]


def test_what_is_nested_is_mapped() -> None:
    mapped = map_batch(lambda tensor: -tensor, MAKE["nested"](torch.ones(2), torch.ones(2)))
    assert mapped.inner[0].x.tolist() == [-1.0, -1.0]
    assert mapped.inner[1]["k"][0].tolist() == [-1.0, -1.0]


class Hidden:
    """Tensors out of sight, as in a graph of another library."""

    def __init__(self, where: str) -> None:
        self.where = (where,)

    def to(self, device: torch.device) -> Hidden:
        return Hidden(device.type)


def test_what_hides_its_tensors_is_moved_by_its_own_method() -> None:
    moved = to_device((Hidden("cpu"), {"graph": Hidden("cpu"), "text": "a"}), torch.device("meta"))
    assert moved[0].where == moved[1]["graph"].where == ("meta",)
    assert moved[1]["text"] == "a"
