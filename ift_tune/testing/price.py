"""What a problem costs: one inner step, one outer step, their ratio; and the meters behind it.

On a GPU PyTorch's allocator counts the memory. On the CPU it does not, and neither substitute is
exact: the peak of the process holds the interpreter and whatever freed memory the system left it,
and the profiler's events are no public interface. So every operation is watched for new storages,
and each storage for its end: the same number each time, exact but for scratch space in a kernel.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ift_tune.base.environment import peak_memory_bytes, reset_peak_memory
from ift_tune.implicit.vectors import count
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer

Result = TypeVar("Result")

_REPEATS = 15


@dataclass(frozen=True)
class Price:
    """Median wall times in seconds, on this machine, at this problem's batch sizes.

    Attributes:
        weights: P.
        hypers: H.
        inner_step: One weight update.
        outer_step: One outer step without its inner steps: a whole hypergradient and its update.
        inner_steps: T, of the configuration.
        product: One product with the Hessian, about: a part of the outer step.
    """

    weights: int
    hypers: int
    inner_step: float
    outer_step: float
    inner_steps: int
    product: float

    def __str__(self) -> str:
        """Return a line."""
        whole = self.inner_steps * self.inner_step + self.outer_step
        return (
            f"inner step {1e3 * self.inner_step:.2f} ms, hypergradient "
            f"{1e3 * self.outer_step:.2f} ms; {self.inner_steps} inner steps with one outer step "
            f"cost {whole / (self.inner_steps * self.inner_step):.2f} times plain training"
        )


def measure_price(joint: JointOptimizer, config: MetaConfig, *, patience: float = 1.0) -> Price:
    """Time inner and outer steps of a problem.

    Args:
        joint: With one inner step an outer step; it is taken a few steps further.
        config: Whose inner steps the price is put together for.
        patience: Seconds after which neither is repeated any more.
    """
    problem = joint.problem
    inner = statistics.median(_repeated(lambda: joint.train_weights(1), patience, joint.device))
    before = joint.cost.hvps
    times = _repeated(joint.step, patience, joint.device)
    outer = max(statistics.median(times) - inner, 0.0)
    products = (joint.cost.hvps - before) / len(times)
    return Price(
        weights=count(problem.weights()),
        hypers=count(problem.hypers()),
        inner_step=inner,
        outer_step=outer,
        inner_steps=config.inner_steps,
        # Beside the products of the solve: the mixed one, and two gradients.
        product=outer / (products + 2.0),
    )


def _repeated(action: Callable[[], object], patience: float, device: torch.device) -> list[float]:
    """Return the wall times of an action that is repeated, at most `_REPEATS` times."""
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < patience:
        times.append(timed(action, device)[1])
    return times


def timed(action: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return what an action returns, and its wall time in seconds."""
    _wait(device)  # a GPU works on while Python goes on: what was asked for before is not counted
    started = time.perf_counter()
    result = action()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
