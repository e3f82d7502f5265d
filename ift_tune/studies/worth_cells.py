"""What a map of worth is made of: the tasks in its cells, by what λ is for and by data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ift_tune import tasks
from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError, nearest, require_integer, require_number
from ift_tune.tasks.base import CLASSES, Task, require_fraction


@dataclass(frozen=True)
class Place:
    """A task on one data set, with its sizes on the map.

    Attributes:
        task: Its name; it has the options ``corrupted`` and ``val``.
        options: Sizes of the other splits, the same in all cells.
        shared: Examples that validation and test share, where the data set has no test split of
            its own: what does not validate is for the test.
        classes: Of how many classes the task counts the examples one by one; 1: all together.
    """

    task: str
    options: Mapping[str, int]
    shared: int | None = None
    classes: int = 1

    def at(self, noise: float, clean: int) -> dict[str, Any]:
        """Return the task's options in a cell.

        Raises:
            UsageError: If there are not so many clean examples, or they do not divide by classes.
        """
        if clean % self.classes:
            raise UsageError(
                f"clean examples of {self.task} must be a multiple of {self.classes}, as many of "
                f"each class, got {clean}"
            )
        val = clean // self.classes
        options = {**self.options, "corrupted": float(noise), "val": val}
        if self.shared is not None:
            if val >= self.shared:
                raise UsageError(
                    f"clean examples of {self.task} must be below {self.shared * self.classes}, so "
                    f"that some are left for the test, got {clean}"
                )
            options["test"] = self.shared - val
        return options


JOBS: dict[str, dict[str, Place]] = {
    "cleaning": {
        "digits": Place("digits-cleaning", {"train": 300, "search": 150}, shared=1347),
        "mnist": Place("mnist-cleaning", {"train": 1000, "search": 1000}),
    },
    # In whole batches, as the others: a step with the validation examples, who come whole, would
    # else cost many times one without.
    "decay": {
        "digits": Place(
            "digits-weight-decay", {"train": 300, "search": 150, "batch_size": 300}, shared=1347
        ),
        "mnist": Place("mnist-weight-decay", {"train": 1000, "search": 1000, "batch_size": 1000}),
    },
    "imbalance": {
        "digits": Place("digits-imbalanced", {"train": 50, "search": 10}, 118, CLASSES),
        "mnist": Place("mnist-imbalanced", {}, classes=CLASSES),
    },
}
"""What λ is for, by the task on each data set: a new job is an entry here."""


@dataclass(frozen=True)
class WorthCell:
    """A cell of the map.

    Attributes:
        data: The data set.
        job: What λ is for.
        noise: The fraction of the training labels that is redrawn.
        clean: How many examples validate.
    """

    data: str
    job: str
    noise: float
    clean: int

    @property
    def name(self) -> str:
        """What messages and its folder are called."""
        return f"{self.data}-{self.job}-noise{self.noise}-clean{self.clean}"

    def task(self, data_root: str | os.PathLike[str] | None = None, download: bool = False) -> Task:
        """Return its task, as the registry has it now, with its options.

        Raises:
            UsageError: If there is no such task or option, or not so many examples.
        """
        place = JOBS[self.job][self.data]
        options = place.at(self.noise, self.clean)
        return tasks.get(place.task, data_root=data_root, download=download, options=options)


def axes_of(
    data: Sequence[str], jobs: Sequence[str], noise: Sequence[float], clean: Sequence[int]
) -> dict[str, list[Any]]:
    """Return the axes of the map, each value once.

    Raises:
        UsageError: If one is empty or holds what it cannot.
    """
    axes = {
        "data": require_list("data", data, "names such as 'digits'"),
        "jobs": require_list("jobs", jobs, "names such as 'cleaning'"),
        "noise": require_list("noise", noise, "fractions such as 0.5"),
        "clean": require_list("clean", clean, "numbers such as 200"),
    }
    for name, values in axes.items():
        if not values:
            raise UsageError(f"{name} must have at least one entry, got none")
    known = {
        "jobs": list(JOBS),
        "data": list(dict.fromkeys(d for job in JOBS.values() for d in job)),
    }
    for name, names in known.items():
        for value in axes[name]:
            if value not in names:
                raise UsageError(f"there is no {value!r} in {name}{nearest(value, names)}")
    for value in axes["noise"]:
        require_number("noise", value, least=0.0)
        require_fraction("noise", value)
    for value in axes["clean"]:
        require_integer("clean", value, 1)
    axes["noise"] = [float(value) for value in axes["noise"]]
    axes["clean"] = [int(value) for value in axes["clean"]]
    return {name: list(dict.fromkeys(values)) for name, values in axes.items()}
