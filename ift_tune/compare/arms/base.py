"""What an arm is: a way to choose hyperparameters under a budget.

Reports and the command line's help read the arms, and shall not wait for PyTorch: so nothing here
imports it at the top, and an arm's methods import what they need when they are called.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, final

from ift_tune.base.errors import UsageError

if TYPE_CHECKING:
    from ift_tune.compare.comparison import Comparison, SearchState
    from ift_tune.joint.callbacks import Callback
    from ift_tune.search.samplers import SamplerFactory
    from ift_tune.search.space import Space
    from ift_tune.trial.trial import Trial

INNER_LR = "inner_lr"
VAL_WEIGHT = "val_weight"  # of a validation example, where that of a training example is 1
ONE = 1
ENDLESS = 10**9  # trials: the budget ends the search

Values: TypeAlias = Mapping[str, tuple[float, ...]]
"""The values that a grid takes of each parameter, by name."""


@dataclass(frozen=True)
class Style:
    """How an arm is drawn. Colour is never the only difference: dashes and marks differ too.

    Attributes:
        color: To be read on white and on near-black.
        dashes: Lengths of strokes and gaps, in line widths; empty for a whole line.
        marker: Matplotlib's name of its mark.
    """

    color: str
    dashes: tuple[float, ...]
    marker: str


@dataclass(frozen=True)
class ArmSpace:
    """What the trials of an arm vary.

    Attributes:
        space: From what to what.
        start: The point that comes closest to the task's defaults: the first trial of a search.
        secondary: Names of parameters that shade another: a grid leaves them where they start.
        further: Points that are tried after it, before any is drawn.
    """

    space: Space
    start: Mapping[str, Any]
    secondary: frozenset[str] = frozenset()
    further: Sequence[Mapping[str, Any]] = ()


class TrialKind(abc.ABC):
    """What the trials of an arm are, and what a search over them varies. Frozen and picklable.

    Attributes:
        groundwork: How many trials, the first of a search, the others build on: what they keep, see
            `SearchState.kept`. They begin at the first point, and so does the first of the others.
    """

    groundwork: ClassVar[int] = 0

    def refusal(self, hyper: object) -> str | None:
        """Return why a task is none for these trials, in half a sentence; None if it is one.

        Args:
            hyper: The task's hyperparameter module, as initialised.
        """
        return None

    @property
    @abc.abstractmethod
    def train_on_val(self) -> bool:
        """Whether the weights are trained on the validation examples too."""

    @abc.abstractmethod
    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        """Return what a search varies.

        Args:
            comparison: The task and its settings.
            hyper: The task's hyperparameter module, as initialised.
        """

    @abc.abstractmethod
    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> Trial:
        """Return the trial at a point of the space, within what is left of the budget.

        Args:
            comparison: The task and its settings.
            point: Values by name; empty where nothing is searched.
            search_state: What the trials before it have spent and found.
            seed: Of the problem and the run.
            device: Where it runs.
            callbacks: Hooks into the optimisation of λ, where there is one.
        """


@dataclass(frozen=True)
class Grid:
    """A search that takes each point of a grid once, in random order.

    Attributes:
        size: How many values of each parameter; one of those that shade another.
        inner_lrs: How many of the inner learning rate.
    """

    size: int
    inner_lrs: int

    def values(self, varied: ArmSpace) -> Values:
        """Return the values of each parameter, even in the logarithm of its range.

        Raises:
            UsageError: If one is not a real number.
        """
        from ift_tune.search.space import Float

        found: dict[str, tuple[float, ...]] = {}
        for name, d in varied.space.distributions.items():
            if not isinstance(d, Float):
                raise UsageError(f"a grid is of real numbers, and {name} is none")
            size = self.inner_lrs if name == INNER_LR else self.size
            shades = name in varied.secondary
            found[name] = (varied.start[name],) if shades else spread(d.low, d.high, size)
        return found


@dataclass(frozen=True)
class Search:
    """How an arm searches on a task, in words that the outer search understands.

    Attributes:
        space: What its trials are drawn from; None if there is nothing to draw.
        first: The first trial's point; None if it is drawn too.
        sampler: Its name, see `samplers.sampler_factory`; what makes it; or a grid's values.
        pruner: Its name, see `pruners.make_pruner`.
        n_trials: Most trials.
        groundwork: How many trials before the first that is searched begin at that point too.
        further: Points of the trials after the first.
    """

    space: Space | None = None
    first: Mapping[str, Any] | None = None
    sampler: str | SamplerFactory | Values = "random"
    pruner: str = "none"
    n_trials: int = ENDLESS
    groundwork: int = 0
    further: Sequence[Mapping[str, Any]] = ()

    @property
    def beginning(self) -> list[Mapping[str, Any]]:
        """The points of the first trials."""
        first = [] if self.first is None else [self.first] * (1 + self.groundwork)
        return [*first, *self.further]


@final
@dataclass(frozen=True)
class Arm:
    """A way to choose hyperparameters: everything that is known of it stands here.

    A new one is a file with its `ARMS` in this folder and a line in the folder's ``__init__``.
    `testing.contracts.check_arm` tells whether it keeps the laws of a comparison.

    Attributes:
        name: In the tables and on the command line.
        label: In figures and tables.
        phrase: Within a sentence of the report, "grid search".
        summary: What it does, in one line.
        style: How it is drawn.
        trials: What its trials are.
        sampler: What chooses their points: a sampler's name, what makes one from
            ``(seed, trial_number)``, or a `Grid`; None: one trial, with the task's settings.
        pruner: What ends trials that do worse than others; its name.
    """

    name: str
    label: str
    phrase: str
    summary: str
    style: Style
    trials: TrialKind
    sampler: str | SamplerFactory | Grid | None = None
    pruner: str = "none"

    @property
    def train_on_val(self) -> bool:
        """Whether its weights are trained on the validation examples too."""
        return self.trials.train_on_val

    def search(self, comparison: Comparison, hyper: object) -> Search:
        """Return how it searches.

        Args:
            comparison: The task and its settings.
            hyper: The task's hyperparameter module, as initialised.
        """
        if self.sampler is None:
            return Search(n_trials=ONE)
        varied = self.trials.space(comparison, hyper)
        if isinstance(self.sampler, Grid):
            return Search(varied.space, None, self.sampler.values(varied), self.pruner)
        return Search(
            varied.space,
            varied.start,
            self.sampler,
            self.pruner,
            groundwork=self.trials.groundwork,
            further=varied.further,
        )


def spread(low: float, high: float, size: int) -> tuple[float, ...]:
    """Return the middles of the `size` parts of equal ratio into which a range is cut."""
    ratio = high / low
    return tuple(low * ratio ** ((i + 0.5) / size) for i in range(size))
