"""What a whole study would take: time, memory, and how many trials fit side by side."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ift_tune.base.errors import require_integer
from ift_tune.implicit.vectors import Tensors
from ift_tune.joint.budget import Budget
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import to_device
from ift_tune.problem.loaders import first_batch
from ift_tune.problem.modes import evaluating
from ift_tune.testing.price import Price, timed

_USED = 0.9  # of a device's memory: the rest is the allocator's and the driver's
_CONTEXT = 512 * 2**20  # bytes that a process takes on a GPU before its first tensor, about


@dataclass(frozen=True)
class Plan:
    """What a study takes, from the prices that were measured here.

    Attributes:
        trials: Of the study.
        outer_steps: Of a trial; None where seconds end it.
        trial_seconds: Of one trial, its evaluations and its retraining.
        study_seconds: Of all, and of the plain training beside them, on `workers` processes.
        trial_bytes: What one trial takes at its peak, the process included.
        device_bytes: What the device has; None where it does not tell.
        per_device: Trials that fit side by side, as many as memory and, on a CPU, cores allow.
        workers: Processes.
    """

    trials: int
    outer_steps: int | None
    trial_seconds: float
    study_seconds: float
    trial_bytes: int
    device_bytes: int | None
    per_device: int | None
    workers: int

    def __str__(self) -> str:
        """Return a line."""
        steps = "" if self.outer_steps is None else f" of {self.outer_steps:,} outer steps"
        fits = (
            "how many fit is not known"
            if self.per_device is None
            else f"{self.per_device} fit on this device side by side"
        )
        return (
            f"{self.trials:,} trials{steps}: {duration(self.trial_seconds)} each, "
            f"{duration(self.study_seconds)} in all with {self.workers} "
            f"worker{'s' * (self.workers > 1)}; {self.trial_bytes / 2**20:,.0f} MiB a trial at its "
            f"peak, {fits}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def duration(seconds: float) -> str:
    """Return a time in words."""
    for least, unit, size in ((172_800.0, "days", 86_400.0), (5400.0, "hours", 3600.0)):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 90.0 else f"{seconds / 60.0:.0f} minutes"


def make_plan(
    joint: JointOptimizer,
    config: MetaConfig,
    budget: Budget,
    price: Price,
    peak_bytes: int,
    *,
    trials: int = 1,
    workers: int = 1,
) -> Plan:
    """Put a study together from the price of its steps.

    Args:
        joint: Of one inner step an outer step, as it was measured.
        config: Of the trials.
        budget: Of each trial.
        price: Of its steps.
        peak_bytes: The most that the tensors of an outer step take.
        trials: Of the study.
        workers: Processes side by side, each as fast as this one.

    Raises:
        UsageError: If there is not even one trial or worker.
    """
    require_integer("n_trials", trials, 1)
    require_integer("workers", workers, 1)
    inner = config.inner_steps * config.accumulate
    # What the counted cost of a step would be with all of its inner steps.
    unit = joint.max_step_cost() + inner - joint.config.inner_steps * config.accumulate
    steps = budget.outer_steps
    if steps is None and budget.gradient_equivalents is not None:
        steps = max(1, int(budget.gradient_equivalents / unit))
    inner_seconds = config.inner_steps * price.inner_step
    evaluation = sum(_evaluation_seconds(joint, split) for split in ("search", "test"))
    if steps is None:
        training, plain = budget.seconds or 0.0, budget.seconds or 0.0
    else:
        evaluations = -(-steps // budget.eval_every)
        training = steps * (inner_seconds + price.outer_step) + evaluations * evaluation
        training = min(training, budget.seconds) if budget.seconds else training
        plain = steps * inner_seconds + 20 * evaluation
    trial = training + plain * budget.retrain
    taken = _trial_bytes(joint, peak_bytes)
    room = device_bytes(joint.device)
    fits = None if room is None else max(int(_USED * room / taken), 0)
    if fits is not None and joint.device.type == "cpu":
        fits = min(fits, os.cpu_count() or 1)
    waves = -(-trials // workers)
    return Plan(trials, steps, trial, waves * trial + plain, taken, room, fits, workers)


def _evaluation_seconds(joint: JointOptimizer, split: str) -> float:
    """Return what one pass over a split takes, from its first batch."""
    loader, problem = getattr(joint.problem.splits, split), joint.problem
    try:
        batches = len(loader)
    except TypeError:  # a stream does not know
        batches = 1
    batch = to_device(first_batch(split, loader), joint.device)
    with evaluating(problem.model), torch.no_grad():
        return batches * timed(lambda: problem.evaluate([batch]), joint.device)[1]


def _trial_bytes(joint: JointOptimizer, peak_bytes: int) -> int:
    """Return what a process with this trial takes where it trains."""
    if joint.device.type == "cuda":
        return torch.cuda.memory_allocated(joint.device) + peak_bytes + _CONTEXT
    resident = _resident_bytes()
    if resident is not None:
        return resident + peak_bytes
    state = [leaf for leaf in tree_leaves(joint.state_dict()) if isinstance(leaf, Tensor)]
    return _size(state) + _size(joint.problem.weights()) + peak_bytes


def _size(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _resident_bytes() -> int | None:
    """Return what this process holds in memory now; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return 1024 * found[0] if found else None


def device_bytes(device: torch.device) -> int | None:
    """Return how much memory a device has: of a CPU, what this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container may have less than its machine
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole
