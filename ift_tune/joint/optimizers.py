"""Optimisers by name or of one's own, their learning rate over the training, their state."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, optim
from torch.optim.lr_scheduler import LRScheduler

from ift_tune.base.errors import UsageError, nearest
from ift_tune.implicit.vectors import Tensors, conform, is_dense

Own: TypeAlias = optim.Optimizer | tuple[optim.Optimizer, LRScheduler] | None
"""What a problem may bring: an optimiser, one with its scheduler, or None: the configuration's."""

SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("float32", "bfloat16")

_ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {"momentum": ("sgd", {"momentum": 0.9})}
_FIXED: Mapping[str, Any] = {
    # A decay beside the loss: ASGD's is called so.
    "lambd": 0.0,
}
_FUSED = ("sgd", "adam")  # the others' fused kernels are not there on every device


def _found() -> dict[str, type[optim.Optimizer]]:
    classes = [c for c in vars(optim).values() if inspect.isclass(c)]
    own = [c for c in classes if issubclass(c, optim.Optimizer) and c is not optim.Optimizer]
    return {c.__name__.lower(): c for c in own}


def _refusal(kind: type[optim.Optimizer]) -> str | None:
    """Return why an optimiser cannot train the weights; None if it can."""
    given = inspect.signature(kind).parameters
    if "weight_decay" in given and given["weight_decay"].default != 0:
        return (
            "its weight decay acts beside the loss, where the implicit function theorem does not "
            "see it: use 'adam' (or 'sgd') with a WeightDecay among the hyperparameters"
        )
    if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
        return "it evaluates the loss several times in a step: use 'sgd' or 'adam'"
    if "sparse" in kind.__name__.lower():
        return "it takes sparse gradients, which have no second derivative: use 'adam'"
    return None


_CLASSES = _found()
_REFUSED = {name: why for name, kind in _CLASSES.items() if (why := _refusal(kind)) is not None}

OPTIMIZERS = tuple(sorted([*_ALIASES, *(_CLASSES.keys() - _REFUSED.keys())]))
"""Every optimiser of `torch.optim` by its name in lower case. None has a weight decay of its own:
decay that is not in the training loss escapes the implicit function theorem."""


def optimizer_name(role: str, optimizer: object) -> str:
    """Return the name of an optimiser that is given by its name or class.

    Raises:
        UsageError: If there is none of that name, or it cannot be used; the reason is given.
    """
    name = optimizer.__name__ if inspect.isclass(optimizer) else optimizer
    if not isinstance(name, str):
        raise UsageError(
            f"{role} must be a name such as 'adam', got {optimizer!r}; return an optimiser of your "
            "own from the problem's configure_inner or configure_outer"
        )
    if (known := name.lower()) in _REFUSED:
        raise UsageError(f"{role} cannot be {name!r}: {_REFUSED[known]}")
    if known not in OPTIMIZERS:
        raise UsageError(f"unknown {role} {name!r}{nearest(known, OPTIMIZERS)}")
    return known


def momentum_options(name: str, momentum: float | None) -> dict[str, Any]:
    """Return the arguments that give an optimiser its momentum: SGD's, or Adam's β₁.

    Raises:
        UsageError: If the optimiser has none.
    """
    if momentum is None:
        return {}
    kind, _ = _ALIASES.get(name, (name, {}))
    given = inspect.signature(_CLASSES[kind]).parameters
    if "momentum" in given:
        return {"momentum": momentum}
    if "betas" in given:
        return {"betas": (momentum, given["betas"].default[1])}
    raise UsageError(
        f"inner_momentum: {name} has no momentum; use 'sgd' or 'adam', or leave it out"
    )


def make_optimizer(
    name: str, tensors: Tensors, lr: float, *, momentum: float | None = None
) -> optim.Optimizer:
    """Return a new optimiser over `tensors`."""
    kind, options = _ALIASES.get(name, (name, {}))
    given = inspect.signature(_CLASSES[kind]).parameters
    # A fused kernel walks through raw memory, over the gaps of a slice too.
    fused = kind in _FUSED and all(is_dense(tensor) for tensor in tensors)
    fast = {"fused": True} if fused else {"foreach": True}
    made = {**options, **fast, **_FIXED, **momentum_options(name, momentum)}
    params: list[Tensor] = list(tensors)
    factory: Any = _CLASSES[kind]
    optimizer: optim.Optimizer = factory(params, lr=lr, **{k: made[k] for k in made if k in given})
    return optimizer


def schedule_factor(schedule: str, warmup: int, step: int, total: int | None) -> float:
    """Return what the learning rate of an inner step is multiplied by.

    It grows linearly over the warm-up, and then falls to 0 at the end of the training, as half a
    cosine or linearly; or it stays.

    Args:
        schedule: One of `SCHEDULES`.
        warmup: Inner steps until the full learning rate.
        step: Inner steps taken before this one.
        total: Inner steps of the whole training; only a constant schedule does without.

    Raises:
        UsageError: If the schedule has an end, and the training's is not known.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if total is None:
        raise UsageError(
            f"inner_schedule={schedule!r} must know the end of the training: give the trial a "
            "Budget with outer_steps or gradient_equivalents, or JointOptimizer its total_steps"
        )
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * share)) if schedule == "cosine" else 1.0 - share


class Descent:
    """An optimiser with its learning rate: the configuration's, or a problem's own.

    Attributes:
        own: Whether it is the problem's.
        name: In checkpoints, which another optimiser refuses.
    """

    def __init__(
        self, own: Own, who: str, tensors: Tensors, name: str, lr: float, **options: Any
    ) -> None:
        """Make the optimiser, or take the one given.

        Args:
            own: What the problem has returned.
            who: The method it came from, for errors.
            tensors: What it is over.
            name: Of the configuration's optimiser.
            lr: Its learning rate.
            options: Further arguments of `make_optimizer`.

        Raises:
            UsageError: If the given one is no optimiser, is over other tensors, or has a weight
                decay.
        """
        self.own = own is not None
        self.tensors, self._lr, self._factor = list(tensors), lr, 1.0
        self._scheduler: LRScheduler | None = None
        if own is None:
            self.optimizer, self.name = make_optimizer(name, tensors, lr, **options), name
            return
        self.optimizer, self._scheduler = _unpacked(own, who)
        self.name = f"{who}: {type(self.optimizer).__name__}"
        _check_groups(self.optimizer, self.tensors, who)

    def step(self, factor: float | None = None) -> None:
        """Take a step along the tensors' gradients.

        Args:
            factor: Of the configuration's learning rate; the problem's own has a scheduler.
        """
        if factor is not None and factor != self._factor and not self.own:
            self._set_lr(factor * self._lr)
            self._factor = factor
        for tensor in self.tensors:
            if tensor.grad is not None:
                tensor.grad = conform(tensor.grad, tensor)
        self.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, and its scheduler's."""
        state = self.optimizer.state_dict()
        if self._scheduler is not None:
            state = state | {"scheduler": self._scheduler.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        state = dict(state)
        scheduled = state.pop("scheduler", None)
        self.optimizer.load_state_dict(state)
        self._restore_types(state)
        if self._scheduler is not None and scheduled is not None:
            self._scheduler.load_state_dict(scheduled)
        if not self.own:
            self._set_lr(self._lr)  # the state's has the factor of its latest step
            self._factor = 1.0

    def inherit(self, state: Mapping[str, Any] | None, taken: int) -> None:
        """Go on where an optimiser with other settings has come to, before the first own step.

        What that one knows of each parameter is taken over. Learning rates, momentum and every
        other option stay this one's, and its scheduler comes to where its own settings lead.

        Args:
            state: The other's `state_dict`; None: it is of another kind, and knows nothing of use.
            taken: The steps that the weights have taken.

        Raises:
            ValueError: If the other's tensors are grouped in another way.
        """
        if state is not None:
            own, theirs = self.optimizer.state_dict()["param_groups"], state["param_groups"]
            pairs = list(zip(own, theirs, strict=True))
            groups = [{**mine, "params": other["params"]} for mine, other in pairs]
            if all(_switches(mine) == _switches(other) for mine, other in pairs):
                self.load_state_dict({"state": state["state"], "param_groups": groups})
        if self._scheduler is not None:
            with warnings.catch_warnings():
                # It misses the optimiser's steps, which the other has taken.
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(taken):
                    self._scheduler.step()

    def _restore_types(self, state: Mapping[str, Any]) -> None:
        """Undo PyTorch's conversion of an optimiser's state to the dtype of the weights.

        NAdam counts in float32 whatever the weights are: converted, it would go on with other bits.
        """
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        tensors = [t for group in self.optimizer.param_groups for t in group["params"]]
        for number, tensor in zip(numbers, tensors, strict=True):
            loaded = self.optimizer.state.get(tensor, {})
            for key, saved in state["state"].get(number, {}).items():
                if isinstance(saved, Tensor) and saved.dtype != loaded[key].dtype:
                    loaded[key] = saved.to(loaded[key].device, copy=True)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def _switches(group: Mapping[str, Any]) -> dict[str, bool]:
    """Return which options of a group are on: a momentum of 0 is off.

    They decide what an optimiser keeps of a parameter (RMSprop asks for a buffer of momentum that
    one without has never made). Learning rates, which a schedule may have brought to 0, do not.
    """
    rates = ("params", "param_names", "lr", "initial_lr")
    return {name: bool(value) for name, value in group.items() if name not in rates}


def _unpacked(own: Any, who: str) -> tuple[optim.Optimizer, LRScheduler | None]:
    optimizer, scheduler = own if isinstance(own, tuple) and len(own) == 2 else (own, None)
    fits = isinstance(optimizer, optim.Optimizer)
    if not fits or not (scheduler is None or isinstance(scheduler, LRScheduler)):
        raise UsageError(
            f"{who} must return a torch.optim optimiser, a pair with its scheduler of "
            f"torch.optim.lr_scheduler, or None, got {own!r}"
        )
    if scheduler is not None and _asks(scheduler):
        raise UsageError(
            f"{who} must return a scheduler that goes by its steps alone: choose one of those of "
            f"torch.optim.lr_scheduler, got {type(scheduler).__name__}, which waits for a number"
        )
    if (reason := _refusal(type(optimizer))) is not None and "decay" not in reason:
        raise UsageError(f"{who} returned {type(optimizer).__name__}: {reason}")
    return optimizer, scheduler


def _asks(scheduler: LRScheduler) -> bool:
    """Return whether a scheduler's step has to be given something."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in kinds for p in parameters)


def _check_groups(optimizer: optim.Optimizer, tensors: list[Tensor], who: str) -> None:
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(t) for t in tensors}
    if set(given) != wanted:
        raise UsageError(
            f"{who} must put each of the {len(wanted)} tensors that it is given into a parameter "
            f"group, got {len(set(given) & wanted)} of them and {len(set(given) - wanted)} others"
        )
    decays = {group.get("weight_decay", 0.0) for group in optimizer.param_groups}
    if any(decays):
        raise UsageError(
            f"{who}: a weight_decay of the optimiser's own (got {max(decays):g}) is not in the "
            "training loss, so the implicit function theorem does not see it: set it to 0 and put "
            "a WeightDecay among the hyperparameters, or the term into the training loss"
        )
