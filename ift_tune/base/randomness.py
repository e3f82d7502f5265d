"""Random numbers of one's own: seeds derived from seeds, and a swapped-in global state."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ift_tune.base.exclusive import exclusive


def derive_seed(*parts: object) -> int:
    """Return a seed in [0, 2³²) that depends on all parts, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


class GlobalState:
    """A copy of the states of PyTorch's, NumPy's and Python's global generators."""

    def __init__(self, device: torch.device) -> None:
        """Copy the present states; the CUDA generator's too when `device` is one."""
        self._device = device
        self._torch = torch.get_rng_state()
        self._numpy = np.random.get_state(legacy=False)
        self._python = random.getstate()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Make this the generators' state."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def same(self, other: GlobalState) -> bool:
        """Return whether nothing has been drawn between the two."""
        key, others = self._numpy["state"], other._numpy["state"]
        return (
            torch.equal(self._torch, other._torch)
            and self._python == other._python
            and key["pos"] == others["pos"]
            and bool((key["key"] == others["key"]).all())
            and (self._cuda is None or other._cuda is None or torch.equal(self._cuda, other._cuda))
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values, which load without executing code."""
        version, internal, gauss = self._python
        numpy = dict(self._numpy)
        key = numpy.pop("state")
        return {
            "torch": self._torch,
            "python": (version, torch.tensor(internal, dtype=torch.int64), gauss),
            "numpy": numpy
            | {"key": torch.from_numpy(key["key"].astype(np.int64)), "pos": int(key["pos"])},
            "cuda": self._cuda,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the generators follow at `restore`."""
        version, internal, gauss = state["python"]
        numpy = dict(state["numpy"])
        key = numpy.pop("key").numpy().astype(np.uint32)
        self._torch = state["torch"]
        self._python = (version, tuple(internal.tolist()), gauss)
        self._numpy = numpy | {"state": {"key": key, "pos": numpy.pop("pos")}}
        self._cuda = state["cuda"]


@contextlib.contextmanager
def drawn_again(state: GlobalState, device: torch.device) -> Iterator[None]:
    """Draw what was drawn from `state` on inside the context; afterwards go on as before."""
    outside = GlobalState(device)
    state.restore()
    try:
        yield
    finally:
        outside.restore()


class RandomStream:
    """A run's own random numbers: the global generators' state, swapped in only while in use.

    A run that draws inside ``with stream.active():`` neither sees nor changes anybody else's
    random numbers, those of other threads' streams included, which wait meanwhile; and its state
    can be saved and restored to the bit.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        """Start the stream at `seed`."""
        self._device = device
        with self._put_back():
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            self._state = GlobalState(device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside the context."""
        with self.aside():
            try:
                yield
            finally:
                self._state = GlobalState(self._device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Draw from a copy of this stream: the stream itself stays where it is."""
        with self._put_back():
            self._state.restore()
            yield

    @contextlib.contextmanager
    def _put_back(self) -> Iterator[None]:
        """Have the generators to oneself, and leave them as they were."""
        with exclusive():
            outside = GlobalState(self._device)
            try:
                yield
            finally:
                outside.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; see `GlobalState.state_dict`."""
        return self._state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._state.load_state_dict(state)
