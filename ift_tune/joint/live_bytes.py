"""How many bytes tensors take while something runs.

On a GPU PyTorch's allocator counts the memory. On the CPU it does not, and neither substitute is
exact: the peak of the process holds the interpreter and whatever freed memory the system left it,
and the profiler's events are no public interface. So every operation is watched for new storages,
and each storage for its end: the same number each time, exact but for scratch space in a kernel.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ift_tune.base.environment import peak_memory_bytes, reset_peak_memory


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside, as they come and go; used as a context.

    Attributes:
        now: Bytes of the tensors that were made inside and are still there.
        peak: The most that has been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # by address, for as long as the storage is there

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note what it made."""
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, counted=False)  # from outside: written to, or viewed, not made
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._note(tensor, counted=True)
        return result

    def _note(self, tensor: Any, *, counted: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor._is_zerotensor():
            return  # the zeros of forward differentiation have no storage
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._sizes:  # a view shares the storage it is of
            return
        self._sizes[address] = size if counted else 0
        self.now += self._sizes[address]
        self.peak = max(self.peak, self.now)
        # By its end and not by its tensor's: a graph or a view may keep the storage for longer.
        weakref.finalize(storage, self._ended, address)

    def _ended(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


@dataclass
class Peak:
    """What `measured_peak` found.

    Attributes:
        bytes: The most that tensors made inside took at one time; 0 until the context ends.
    """

    bytes: int = 0


@contextlib.contextmanager
def measured_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the memory of tensors that are made inside."""
    peak = Peak()
    if device.type == "cuda":
        gc.collect()  # what waits to be collected would else end inside and be missing at the peak
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        reset_peak_memory(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = (peak_memory_bytes(device) or 0) - before
        return
    with LiveBytes() as live:
        yield peak
    peak.bytes = live.peak
