"""What the tensors of a batch hold, known without a look at the batch: no one waits for a device.

A look at a label is worth having, for a wrong one trains on in silence or stops a kernel without a
word. But a look at a tensor on a device waits for all that the device has yet to do. So it is taken
where it costs next to nothing: at all rows of a loader at once, or at a batch before it is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Contents:
    """What is known of a tensor, and so of each of its rows: a fact is looked up once."""

    def __init__(self, source: Tensor) -> None:
        """Take the tensor; nothing is looked at yet."""
        self._source, self._version = source, source._version
        self._facts: dict[Hashable, Any] = {}

    @property
    def stale(self) -> bool:
        """Whether the tensor has been written into since."""
        return self._source._version != self._version

    def fact(self, name: Hashable, look: Callable[[Tensor], T]) -> T:
        """Return what `look` says of the tensor; asked of it the first time.

        Args:
            name: What it is called, with all that it depends on.
            look: What is true of a tensor in such a way that it holds for any of its rows.
        """
        if name not in self._facts:
            self._facts[name] = look(self._source)
        found: T = self._facts[name]
        return found


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note(tensor: Tensor, contents: Contents) -> Tensor:
    """Note what a tensor on a device holds, and return it; on the CPU anyone may look."""
    if not tensor.is_cpu and not tensor.is_inference():
        _known[tensor] = contents, tensor._version
    return tensor


def contents_of(tensor: Tensor) -> Contents | None:
    """Return what is known of a tensor; None on the CPU, where it is from elsewhere, or changed."""
    if tensor.is_cpu or tensor not in _known:
        return None
    contents: Contents
    contents, version = _known[tensor]
    return None if contents.stale or tensor._version != version else contents
