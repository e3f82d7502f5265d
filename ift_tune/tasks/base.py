"""What a task declares: a problem, its data and splits, its target, and a budget that suits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ift_tune.base.errors import UsageError, nearest
from ift_tune.joint.budget import Budget
from ift_tune.tasks.datasets import DataSet, load

# Neither this file, nor one that declares tasks or data sets, imports PyTorch, or a module that
# does, before a problem is built: `ift-tune tasks` would take seconds to print a list. So functions
# that build and read import inside, classes of problems live in `problems`, settings are plain.
if TYPE_CHECKING:
    import torch

    from ift_tune.joint.config import MetaConfig
    from ift_tune.joint.flat import FlatValue
    from ift_tune.problem.problem import BilevelProblem

CLASSES = 10
"""Of every data set of images here."""

Build: TypeAlias = "Callable[[Any, torch.device, int], BilevelProblem]"
"""``build(data, device, seed)``: the problem with its initial weights, splits and λ, from what
`datasets.load` returns. A frozen dataclass with such a `__call__` has its fields as options."""

Settings: TypeAlias = "Mapping[str, FlatValue]"
"""Meta-hyperparameters as `MetaConfig.from_flat` takes them."""

_COMMON: dict[str, FlatValue] = {
    "meta_lr": 0.01,
    "meta_optimizer": "adam",
    "inner_steps": 20,
    "inner_lr": 1e-3,
    "inner_optimizer": "adam",
    "warm_start": False,
    "curvature": "hessian",
}
NEUMANN: Settings = {"inverse": "neumann", "terms": 5, "tolerance": 1e-3, **_COMMON}
"""``MetaConfig(inverse=Neumann())`` in plain values, for tasks to change."""
CONJUGATE_GRADIENT: Settings = {
    "inverse": "conjugate_gradient",
    "max_steps": 20,
    "tolerance": 1e-5,
    "damping": 0.0,
    **_COMMON,
}
"""Likewise ``MetaConfig(inverse=ConjugateGradient())``."""


def require_fraction(name: str, value: float) -> None:
    """Raise a `UsageError` unless `value` is between 0 and 1, both included."""
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} must be a fraction from 0 to 1, got {value!r}")


@dataclass(frozen=True)
class Target:
    """When a task counts as solved: a metric at or below a value.

    Attributes:
        metric: A column of the tables.
        value: The value to reach or go below.
        reason: Where the value comes from.

    Example:
        >>> from ift_tune.tasks import Target
        >>> target = Target("retrained_test_error", 0.1, "softmax regression has 0.08")
        >>> target.value
        0.1
    """

    metric: str
    value: float
    reason: str


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights P, of hyperparameters H, and of examples in each split.

    Example:
        >>> from ift_tune import tasks
        >>> sizes = tasks.get("digits-cleaning").sizes
        >>> sizes.weights, sizes.hypers, sizes.train
        (650, 601, 600)
    """

    weights: int
    hypers: int
    train: int
    val: int
    search: int
    test: int


@dataclass(frozen=True)
class Task:
    """A ready problem. Frozen and picklable, so `make_problem` travels to other processes.

    Attributes:
        name: What the command line calls it.
        summary: One line.
        data: The name of the data set it reads.
        build: Builds the problem.
        sizes: P, H and the splits.
        target: When it is solved.
        settings: Meta-hyperparameters that work, in plain values; see `default_config`.
        budget: A length of trial that suits it.
        data_root: Where the data set lies; None reads the environment.
        download: Whether it may be fetched.
        embedded: Whether embedded data stands in for the data set, smaller than declared.
        small: The options for `embedded`, where those of the real data would take long.
        source: How to get the data set, if it is none of `datasets.DATA_SETS`.

    Example:
        >>> from ift_tune import tasks
        >>> task = tasks.get("digits-weight-decay", options={"batch_size": 25})
        >>> problem = task.make_problem(task.default_config, "cpu", seed=0)
        >>> inputs, *_ = next(iter(problem.splits.train))
        >>> inputs.shape, problem.hyper.count
        (torch.Size([25, 64]), 2410)
    """

    name: str
    summary: str
    data: str
    build: Build
    sizes: Sizes
    target: Target
    settings: Settings
    budget: Budget
    data_root: str | os.PathLike[str] | None = None
    download: bool = False
    embedded: bool = False
    small: Mapping[str, Any] = field(default_factory=dict)
    source: DataSet | None = None

    @property
    def default_config(self) -> MetaConfig:
        """Meta-hyperparameters that work.

        Raises:
            UsageError: If one of `settings` is unknown or out of range.
        """
        from ift_tune.joint.config import MetaConfig

        return MetaConfig.from_flat(self.settings)

    def options(self) -> dict[str, Any]:
        """Return what can be set about the problem, such as its batch size, by name."""
        build = self.build
        if not is_dataclass(build):
            return {}
        return {f.name: getattr(build, f.name) for f in fields(build)}

    def with_options(self, options: Mapping[str, Any]) -> Task:
        """Return the task with other options; its declared sizes are then not its own.

        Raises:
            UsageError: If it has no such option, or the value is of another type.
        """
        known = self.options()
        for name, value in options.items():
            if name not in known:
                raise UsageError(f"{self.name} has no option {name!r}{nearest(name, known)}")
            if type(value) is not type(known[name]):
                raise UsageError(
                    f"option {name} of {self.name} is like {known[name]!r}, got {value!r}"
                )
            if isinstance(value, int) and value < 1 <= known[name]:  # a number of something
                raise UsageError(f"option {name} of {self.name} must be at least 1, got {value!r}")
        build: Any = self.build
        return replace(self, build=replace(build, **options)) if options else self

    def on_embedded_data(self) -> Task:
        """Return the task on data that needs no file: to try it out, not for its figures."""
        return replace(self.with_options(self.small), embedded=True)

    def make_problem(
        self, config: MetaConfig, device: torch.device | str, seed: int
    ) -> BilevelProblem:
        """Build the problem: a problem factory, see `ift_tune.Trial`.

        Args:
            config: The trial's meta-hyperparameters; the built-in tasks do not depend on them.
            device: Where weights, hyperparameters and data go.
            seed: Of the splits, the initial weights and the order of batches.

        Raises:
            DataNotFoundError: If the data set is not found.
        """
        import torch

        from ift_tune.base.randomness import RandomStream

        found = load(
            self.data,
            source=self.source,
            root=self.data_root,
            download=self.download,
            embedded=self.embedded,
        )
        device = torch.device(device)
        with RandomStream(seed, device).aside():
            return self.build(found, device, seed)

    def describe(self) -> str:
        """Return what the task is, in a few lines."""
        s = self.sizes
        options = "  ".join(f"{name}={value}" for name, value in self.options().items())
        return (
            f"{self.name}: {self.summary}\n"
            f"  data {self.data}; {s.weights:,} weights, {s.hypers:,} hyperparameters; "
            f"{s.train:,} train, {s.val:,} val, {s.search:,} search, {s.test:,} test examples\n"
            f"  target: {self.target.metric} <= {self.target.value:g} ({self.target.reason})"
            + (f"\n  options: {options}" if options else "")
        )
