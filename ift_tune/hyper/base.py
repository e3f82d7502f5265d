"""The interface of a kind of hyperparameters, and the composition of several."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ift_tune.base.arguments import shown
from ift_tune.base.errors import UsageError, renamed_method
from ift_tune.base.views import View
from ift_tune.hyper.weighing import Criterion as Criterion
from ift_tune.hyper.weighing import made_criterion, require_as_many
from ift_tune.implicit.penalty import Penalty, SumPenalty


@dataclass(frozen=True)
class CoarseParameter:
    """A positive number that sets many hyperparameters at once, searched on a logarithmic scale.

    Attributes:
        low: The least value.
        high: The largest.
        start: What comes closest to how the kind is initialised.
        secondary: Whether it shades another parameter: a grid leaves it at `start`.

    Example:
        >>> import torch, ift_tune
        >>> decay = ift_tune.WeightDecay(torch.nn.Linear(3, 2), "model", init=0.01)
        >>> decay.coarse_space()["decay"].high
        1.0
        >>> ift_tune.CoarseParameter.near(1e-3, 10.0, 25.0)
        CoarseParameter(low=0.001, high=10.0, start=10.0, secondary=False)
    """

    low: float
    high: float
    start: float
    secondary: bool = False

    @classmethod
    def near(cls, low: float, high: float, value: float) -> CoarseParameter:
        """Return a parameter that starts at `value`, or at the end of its range next to it."""
        return cls(low, high, min(max(value, low), high))


class HyperKind(nn.Module, abc.ABC):
    """A family of hyperparameters: its parameters are λ, its hooks say where they act.

    A kind overrides the hooks it needs; `SupervisedProblem` calls all of them, in training alone.
    Outside of it, a training loss of one's own calls the hook, or the kind, by hand. What is to act
    wherever the model is called, as a scale, the kind puts into the model when it is made.
    `testing.contracts.check_kind` checks a kind of one's own against the laws of the family.

    Example:
        >>> import torch, ift_tune
        >>> class Temperature(ift_tune.HyperKind):
        ...     name = "temperature"
        ...     def __init__(self, like):
        ...         super().__init__()
        ...         self.raw = torch.nn.Parameter(like.new_zeros(()))
        ...     def criterion(self, loss):
        ...         return lambda logits, targets: loss(logits / self.raw.exp(), targets)
        ...     def summary(self):
        ...         return {"value": float(self.raw.detach().exp())}
        >>> kind = Temperature(torch.ones(1))
        >>> kind.count, kind.words()
        (1, 'temperature: value 1')
    """

    name: ClassVar[str]
    replaces_inputs: ClassVar[bool] = False
    """Whether `inputs` puts others in their place; in a composition that happens first."""
    assumes_equal_answers: bool = False
    """Whether λ means what it says only if as many answers count of each training example."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a kind that was written before its hooks were renamed go on working.

        It has `knobs` and `turn`, which no one here calls: they become the new methods.
        """
        super().__init_subclass__(**kwargs)
        for old, new in (("knobs", "coarse_space"), ("turn", "set_coarse")):
            if {old, new} <= set(vars(cls)):
                continue  # a method of its own that happens to have the old name
            owner = next(base for base in cls.__mro__ if {old, new} & set(vars(base)))
            if new not in vars(owner):
                text = f"{cls.__name__}.{old} is now {new}: rename it"
                warnings.warn(text, DeprecationWarning, stacklevel=3)  # above ABCMeta.__new__
                setattr(cls, new, vars(owner)[old])
            if new in vars(cls):
                # Of this very method: by its name, `super().knobs()` would lead back to a subclass.
                setattr(cls, old, renamed_method(old, vars(cls)[new]))

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
            losses: Loss of each example, shape (B,): the mean over its answers that count. In the
                mean over the batch an example then counts by how many those are.
            index: Position of each example in the training split, shape (B,), or None if the
                loader does not give it.
        """
        return losses

    def weigh_seen(self, losses: Tensor, inputs: Any, index: Tensor | None) -> Tensor:
        """Return the losses of a batch of training examples, reweighted by what is seen of them.

        What `SupervisedProblem` calls: a kind overrides it in place of `weigh` where its weights
        depend on more than the losses and the index.

        Args:
            losses: As in `weigh`.
            inputs: As the loader gives them, before any kind has changed them; of inputs by name
                that are one tensor, the tensor.
            index: As in `weigh`.
        """
        return self.weigh(losses, index)

    @abc.abstractmethod
    def summary(self) -> dict[str, float]:
        """Return what was learned as a few named numbers, after the transform."""

    def learned(self) -> dict[str, Tensor]:
        """Return what was learned as a few named arrays, detached, after the transform.

        Where λ has no meaning of its own, as the weights of a network, these are its parameters.
        """
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def words(self) -> str:
        """Return what was learned in a sentence, without a full stop."""
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.summary().items())
        return f"{self.name.replace('_', ' ')}: {numbers}"

    def views(self) -> list[View]:
        """Return pictures of what was learned, detached, on the CPU and small.

        As data, which whoever has Matplotlib draws: workers and run directories need none.
        """
        return []

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the few numbers that `set_coarse` takes; none if the kind has no such summary.

        A comparison with black-box searches tunes them: it is the low-dimensional version of
        what gradients tune one by one.
        """
        return {}

    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Set all hyperparameters from a value for each parameter of `coarse_space`."""

    knobs = renamed_method("knobs", coarse_space)
    turn = renamed_method("turn", set_coarse)

    @property
    def count(self) -> int:
        """The number of hyperparameters."""
        return sum(p.numel() for p in self.parameters())

    def in_use(self) -> dict[str, bool]:
        """Return which parts of λ have been used by a call of the model since the kind was made.

        For a kind that acts at several places of the model, of which a call may pass some by. They
        are asked for once, when the losses have been taken: idle parts are refused.

        Returns:
            By a name for an error, "the scale of head"; none of a kind of which autograd can tell
            it, tensor by tensor.
        """
        return {}

    @property
    def made_of(self) -> nn.Module | None:
        """The model, or the part of one, that the kind has been made of; None: of none.

        A problem that trains another is refused.
        """
        return None

    @property
    def takes_index(self) -> bool:
        """Whether a hook that is given the examples' positions is the kind's own."""
        return _overrides(self, "inputs", "weigh", "weigh_seen")

    @property
    def examples_known(self) -> int | None:
        """How many training examples the kind tells apart by their positions; None: it does not."""
        return None

    @property
    def takes_losses(self) -> bool:
        """Whether a hook that acts on the losses of single examples is the kind's own."""
        return _overrides(self, "criterion", "weigh", "weigh_seen")

    @property
    def closed_form(self) -> bool:
        """Whether λ acts through a closed-form penalty alone: then it is free in inner steps."""
        return self.penalty() is not None

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a small instance for `model` and its training inputs, images (N, C, H, W).

        The kinds of the package have one, on which the laws of the family are checked. One of your
        own needs none: `check_kind` also takes an instance, or a function that makes one.

        Raises:
            UsageError: If the kind has none.
        """
        raise UsageError(
            f"{cls.__name__} has no example: give check_kind an instance with its model and a "
            "batch, or a function (model, inputs) that makes one, got the class"
        )


def _refuse_shared(kinds: Mapping[str, HyperKind]) -> None:
    """Raise a `UsageError` if two kinds are one, or have a parameter in common.

    Each would count it as its own: a step by λ is not that of the two effects together.
    """
    owners: dict[int, str] = {}
    for name, kind in kinds.items():
        for part in (kind, *kind.parameters()):
            other = owners.setdefault(id(part), name)
            if other != name:
                raise UsageError(
                    "Compose must have kinds with hyperparameters of their own: make another kind "
                    f"as {name}, or leave it out, got those of {other} there"
                )


def _overrides(kind: HyperKind, *hooks: str) -> bool:
    """Return whether one of the hooks is the kind's own."""
    return any(getattr(type(kind), hook) is not getattr(HyperKind, hook) for hook in hooks)


KindT = TypeVar("KindT", bound="HyperKind")


def kinds_in(hyper: object, kind: type[KindT]) -> list[KindT]:
    """Return the kinds of one class that a problem's hyperparameters are or hold."""
    modules = hyper.modules() if isinstance(hyper, nn.Module) else ()
    return [module for module in modules if isinstance(module, kind)]


class Compose(HyperKind):
    """Several kinds at once, by name.

    Example:
        >>> import torch, ift_tune
        >>> model = torch.nn.Linear(3, 2)
        >>> hyper = ift_tune.Compose(
        ...     {
        ...         "decay": ift_tune.WeightDecay(model, "tensor", init=0.25),
        ...         "smoothing": ift_tune.LabelSmoothing(2, init=0.125),
        ...     }
        ... )
        >>> hyper.count
        3
        >>> hyper.summary()["smoothing.smoothing"]
        0.125
    """

    name: ClassVar[str] = "compose"

    def __init__(self, kinds: Mapping[str, HyperKind]) -> None:
        """Take the kinds, applied in order.

        Raises:
            UsageError: If there is none, one is not a `HyperKind`, or two have a λ in common.
        """
        super().__init__()
        if not isinstance(kinds, Mapping) or not kinds:
            raise UsageError(
                "Compose must have a mapping of names to kinds of hyperparameters, such as "
                f'{{"decay": WeightDecay(model)}}, got {shown(kinds)}'
            )
        for name, kind in kinds.items():
            # A dot stands between a kind's name and that of its parts.
            if not isinstance(name, str) or not name or "." in name:
                raise UsageError(
                    f"Compose must have names without dots for its kinds, got {shown(name)}"
                )
            if not isinstance(kind, HyperKind):
                raise UsageError(
                    f"Compose must have a kind of hyperparameters as {name}, an object such as "
                    f"WeightDecay(model), got {shown(kind)}"
                )
        _refuse_shared(kinds)
        self.kinds = nn.ModuleDict(dict(kinds))

    def __getitem__(self, name: str) -> HyperKind:
        """Return one of the kinds."""
        kind = self.kinds[name]
        if not isinstance(kind, HyperKind):
            raise UsageError(f"{name} is not a hyperparameter kind")
        return kind

    def _items(self) -> Iterator[tuple[str, HyperKind]]:
        return ((name, self[name]) for name in self.kinds)

    def penalty(self) -> Penalty | None:
        """Return the sum of the kinds' penalties, None if none has one."""
        parts = [p for _, kind in self._items() if (p := kind.penalty()) is not None]
        return SumPenalty(parts) if parts else None

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        """Let every kind change the inputs, one after the other; those that replace them first."""
        # Whatever was changed before would be lost, and its λ would not reach the loss.
        for _, kind in sorted(self._items(), key=lambda item: not item[1].replaces_inputs):
            inputs = kind.inputs(inputs, index)
        return inputs

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Enter every kind's context."""
        with contextlib.ExitStack() as stack:
            for _, kind in self._items():
                stack.enter_context(kind.applied())
            yield

    def criterion(self, loss: Criterion) -> Criterion:
        """Wrap the loss by every kind, the first innermost."""
        for _, kind in self._items():
            loss = made_criterion(loss, kind, kind.criterion)
        return loss

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        """Apply every kind's weights, one after the other."""
        for _, kind in self._items():
            losses = require_as_many(kind.weigh(losses, index), losses, kind)
        return losses

    def weigh_seen(self, losses: Tensor, inputs: Any, index: Tensor | None) -> Tensor:
        """Apply every kind's weights likewise, with sight of the inputs."""
        for _, kind in self._items():
            losses = require_as_many(kind.weigh_seen(losses, inputs, index), losses, kind)
        return losses

    def words(self) -> str:
        """Return the kinds' sentences."""
        return "; ".join(kind.words() for _, kind in self._items())

    def views(self) -> list[View]:
        """Return the kinds' pictures, with their names in the titles."""
        return [
            replace(view, title=f"{name}: {view.title}")
            for name, kind in self._items()
            for view in kind.views()
        ]

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the kinds' parameters under their names."""
        return {
            f"{name}.{key}": parameter
            for name, kind in self._items()
            for key, parameter in kind.coarse_space().items()
        }

    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Set every kind by its own parameters; one none of whose are given stays as it is."""
        for name, kind in self._items():
            prefix = f"{name}."
            own = {key[len(prefix) :]: v for key, v in values.items() if key.startswith(prefix)}
            if own:
                kind.set_coarse(own)

    def summary(self) -> dict[str, float]:
        """Return the kinds' numbers under their names."""
        return {
            f"{name}.{key}": value
            for name, kind in self._items()
            for key, value in kind.summary().items()
        }

    def learned(self) -> dict[str, Tensor]:
        """Return the kinds' arrays under their names."""
        return {
            f"{name}.{key}": array
            for name, kind in self._items()
            for key, array in kind.learned().items()
        }

    @property
    def takes_index(self) -> bool:
        """Whether one of the kinds is."""
        return any(kind.takes_index for _, kind in self._items())

    @property
    def takes_losses(self) -> bool:
        """Whether one of the kinds does."""
        return any(kind.takes_losses for _, kind in self._items())

    @property
    def closed_form(self) -> bool:
        """Whether every kind is in closed form."""
        return all(kind.closed_form for _, kind in self._items())

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Compose nothing but itself: the laws are checked on compositions of other kinds."""
        raise UsageError("Compose is made of other kinds; take their examples")
