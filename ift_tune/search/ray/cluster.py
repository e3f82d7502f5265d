"""Starting Ray here or joining a cluster, and what a cluster can run at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence

import ray

from ift_tune.base.errors import UsageError
from ift_tune.search.backends import RayTune
from ift_tune.trial.runner import Interrupt

_NO_HANDLER = "TUNE_DISABLE_SIGINT_HANDLER"
_OBJECT_STORE = 200 * 2**20  # bytes; what a trial sends is a few kilobytes at a time


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Use the Ray that this process is connected to already; else join `address`, or start one.

    Raises:
        UsageError: If there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster can be joined at {address!r} ({str(error).splitlines()[0]}): start "
            "one with `ray start --head`, or leave --address out to start Ray here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def concurrency(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> str:
    """Return in a sentence how many trials run at a time.

    Args:
        nodes: What each node offers, ``{"CPU": 8.0, "GPU": 2.0}``.
        cpus: Of a trial.
        gpus: Of a trial, possibly a part of one.

    Raises:
        UsageError: If no node can hold a trial, which Ray would wait for without end.
    """
    RayTune(cpus_per_trial=cpus, gpus_per_trial=gpus)  # refuses what no node could have
    offered = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    slots = sum(_slots(node, cpus, gpus) for node in offered)
    nodes_text = _count(len(offered), "node")
    total = f"{sum(c for c, _ in offered):g} CPUs and {sum(g for _, g in offered):g} GPUs"
    wanted = f"{cpus:g} CPUs and {gpus:g} GPUs"
    if not slots:
        each = "; ".join(f"{c:g} CPUs and {g:g} GPUs" for c, g in offered)
        raise UsageError(
            f"a trial needs {wanted}, and no node has them ({each}): lower --cpus-per-trial or "
            "--gpus-per-trial, or start Ray where there are more"
        )
    return f"{nodes_text} with {total}; a trial takes {wanted}: {slots} at a time"


def check_room(cpus: float, gpus: float) -> str:
    """Return `concurrency` for the cluster this process is connected to."""
    return concurrency([n["Resources"] for n in ray.nodes() if n["Alive"]], cpus, gpus)


def _slots(node: tuple[float, float], cpus: float, gpus: float) -> int:
    """Return how many trials fit on a node. A share of a GPU does not reach over two of them."""
    counts = []
    if cpus:
        counts.append(int(node[0] / cpus + 1e-9))
    if gpus:
        counts.append(int(node[1]) * int(1 / gpus + 1e-9))
    return min(counts)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


@contextlib.contextmanager
def stopping_ray() -> Iterator[Interrupt]:
    """Let Ctrl-C and SIGTERM end ``Tuner.fit`` after a snapshot, and note that they came.

    Ray's own handlers swallow the one, and end the process at the other.
    """
    interrupt = Interrupt(then=lambda: signal.raise_signal(signal.SIGUSR1))  # Ray listens to that
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    asked = os.environ.get(_NO_HANDLER)
    os.environ[_NO_HANDLER] = "1"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # while Ray does not listen yet
    try:
        with interrupt.listening():
            yield interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)
        if asked is None:
            del os.environ[_NO_HANDLER]
        else:
            os.environ[_NO_HANDLER] = asked
