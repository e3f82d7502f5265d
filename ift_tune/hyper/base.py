"""The interface of a kind of hyperparameters, and the composition of several."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.views import View
from ift_tune.implicit.penalty import Penalty, SumPenalty


@dataclass(frozen=True)
class CoarseParameter:
    """A positive number, searched on a logarithmic scale.

    Attributes:
        low: The least value.
        high: The largest.
        start: What comes closest to how the kind is initialised.
        secondary: Whether it shades another parameter: a grid leaves it at `start`.
    """

    low: float
    high: float
    start: float
    secondary: bool = False


Init: TypeAlias = float | Callable[[Tensor], object]
"""Where λ starts: the value after the transform, or a function that fills the raw tensor in place
(``functools.partial(nn.init.uniform_, a=0, b=1)``)."""


Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``criterion(logits, targets)``: the loss of each example, as `F.cross_entropy` gives it without
reduction. Logits have shape (B, classes, ...); targets are class numbers (B, ...), or
probabilities of the logits' shape. The losses have shape (B, ...)."""


class HyperKind(nn.Module, abc.ABC):
    """A family of hyperparameters: its parameters are λ, its hooks say where they act.

    A kind overrides the hooks it needs; `ClassificationProblem` calls all of them, in training
    alone. Outside of it, a training loss of one's own calls the hook, or the kind, by hand.
    """

    name: ClassVar[str]
    replaces_inputs: ClassVar[bool] = False
    """Whether `inputs` puts others in their place; in a composition that happens first."""

    def penalty(self) -> Penalty | None:
        """Return a regulariser in closed form at the present λ, or None."""
        return None

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        """Return the inputs of a training batch, shape (B, ...), changed or replaced.

        Args:
            inputs: As the loader gives them.
            index: Position of each example in the training split, shape (B,), or None if the
                loader does not give it.
        """
        return inputs

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which the model runs with λ inside it, as with learned dropout."""
        return contextlib.nullcontext()

    def criterion(self, loss: Criterion) -> Criterion:
        """Return a training criterion made from another."""
        return loss

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Return the losses of a batch of training examples, reweighted.

        Args:
            losses: Loss of each example, shape (B,).
            index: Position of each example in the training split, shape (B,), or None if the
                loader does not give it.
        """
        return losses

    @abc.abstractmethod
    def summary(self) -> dict[str, float]:
        """Return what was learned as a few named numbers, after the transform."""

    def words(self) -> str:
        """Return what was learned in a sentence, without a full stop."""
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.summary().items())
        return f"{self.name.replace('_', ' ')}: {numbers}"

    def views(self) -> list[View]:
        """Return pictures of what was learned, detached, on the CPU and small."""
        return []

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the few numbers that `turn` takes; none if the kind has no such summary.

        A comparison with black-box searches turns them: it is the low-dimensional version of
        what gradients tune one by one.
        """
        return {}

    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Set all hyperparameters from a value for each of `knobs`."""

    @property
    def count(self) -> int:
        """The number of hyperparameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def closed_form(self) -> bool:
        """Whether λ acts through a closed-form penalty alone: then it is free in inner steps."""
        return self.penalty() is not None

    @classmethod
    @abc.abstractmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a small instance for `model` and its training inputs, images (N, C, H, W).

        The contract tests of the family run on it, so a new kind is covered the day it is added.
        """


class Compose(HyperKind):
    """Several kinds at once, by name: ``Compose({"decay": ..., "examples": ...})``."""

    name: ClassVar[str] = "compose"

    def __init__(self, kinds: Mapping[str, HyperKind]) -> None:
        """Take the kinds, applied in order.

        Raises:
            UsageError: If there is none, or one is not a `HyperKind`.
        """
        super().__init__()
        if not kinds or not all(isinstance(kind, HyperKind) for kind in kinds.values()):
            raise UsageError("Compose needs a mapping of names to hyperparameter kinds")
        self.kinds = nn.ModuleDict(dict(kinds))

    def __getitem__(self, name: str) -> HyperKind:
        """Return one of the kinds."""
        kind = self.kinds[name]
        if not isinstance(kind, HyperKind):
            raise UsageError(f"{name} is not a hyperparameter kind")
        return kind

    def penalty(self) -> Penalty | None:
        """Return the sum of the kinds' penalties, None if none has one."""
        parts = [p for name in self.kinds if (p := self[name].penalty()) is not None]
        return SumPenalty(parts) if parts else None

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        """Let every kind change the inputs, one after the other; those that replace them first."""
        for name in sorted(self.kinds, key=lambda name: not self[name].replaces_inputs):
            inputs = self[name].inputs(inputs, index)
        return inputs

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Enter every kind's context."""
        with contextlib.ExitStack() as stack:
            for name in self.kinds:
                stack.enter_context(self[name].applied())
            yield

    def criterion(self, loss: Criterion) -> Criterion:
        """Wrap the loss by every kind, the first innermost."""
        for name in self.kinds:
            loss = self[name].criterion(loss)
        return loss

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Apply every kind's weights, one after the other."""
        for name in self.kinds:
            losses = self[name].weigh(losses, index)
        return losses

    def words(self) -> str:
        """Return the kinds' sentences."""
        return "; ".join(self[name].words() for name in self.kinds)

    def views(self) -> list[View]:
        """Return the kinds' pictures, with their names in the titles."""
        return [
            replace(view, title=f"{name}: {view.title}")
            for name in self.kinds
            for view in self[name].views()
        ]

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the kinds' parameters under their names."""
        return {
            f"{name}.{key}": knob
            for name in self.kinds
            for key, knob in self[name].coarse_space().items()
        }

    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Turn every kind's own."""
        for name in self.kinds:
            self[name].set_coarse(
                {key: values[f"{name}.{key}"] for key in self[name].coarse_space()}
            )

    def summary(self) -> dict[str, float]:
        """Return the kinds' numbers under their names."""
        return {
            f"{name}.{key}": value
            for name in self.kinds
            for key, value in self[name].summary().items()
        }

    @property
    def closed_form(self) -> bool:
        """Whether every kind is in closed form."""
        return all(self[name].closed_form for name in self.kinds)

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Compose nothing but itself: the contract tests compose the registered kinds."""
        raise UsageError("Compose is made of other kinds; take their examples")


@torch.no_grad()
def initialise(raw: Tensor, init: Init, inverse: Callable[[Tensor], Tensor], bounds: str) -> None:
    """Fill `raw` so that its transform has the value `init`, or by the function `init`.

    Raises:
        UsageError: If the value has no finite inverse under the transform.
    """
    if callable(init):
        init(raw)
        return
    raw.fill_(float(inverse(torch.tensor(float(init), dtype=torch.float64))))
    if not bool(torch.isfinite(raw).all()):
        raise UsageError(f"init must be {bounds}, got {init}")


def quantiles(values: Tensor) -> dict[str, float]:
    """Return minimum, median, mean and maximum of a tensor."""
    flat = values.detach().flatten()
    return {
        "min": float(flat.min()),
        "median": float(flat.median()),
        "mean": float(flat.mean()),
        "max": float(flat.max()),
    }
