"""What the outer search tunes: the meta-hyperparameters of one trial, as an object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from torch import Tensor, optim

from ift_tune.base.arguments import require_instance, take_plain
from ift_tune.base.errors import UsageError, nearest, require_integer, require_number
from ift_tune.implicit.inverse import INVERSES, Inverse, Neumann
from ift_tune.implicit.preconditioner import NoPreconditioner
from ift_tune.implicit.vectors import Tensors, is_dense
from ift_tune.joint.budget import Budget as Budget  # this was its home once
from ift_tune.joint.flat import (
    CHOICES,
    Flat,
    build_choice,
    choices_of,
    find_kind,
    flatten_choice,
    names,
    plain,
    refuse_shared_names,
    refuse_strangers,
    typed,
)

_FACTORIES: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda params, lr, fused: optim.SGD(params, lr=lr, fused=fused),
    "momentum": lambda params, lr, fused: optim.SGD(params, lr=lr, momentum=0.9, fused=fused),
    "adam": lambda params, lr, fused: optim.Adam(params, lr=lr, fused=fused),
    "rmsprop": lambda params, lr, fused: optim.RMSprop(params, lr=lr, foreach=True),
}

OPTIMIZERS = tuple(_FACTORIES)
"""None has a weight decay of its own: decay that is not in the training loss escapes the implicit
function theorem."""


def check_optimizer(role: str, name: str) -> None:
    """Raise a `UsageError` unless `name` is a known optimiser."""
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown {role} {name!r}{nearest(str(name), OPTIMIZERS)}")


def make_optimizer(name: str, tensors: Tensors, lr: float) -> optim.Optimizer:
    """Return a new optimiser over `tensors`."""
    params: list[Tensor] = list(tensors)
    # A fused kernel walks through raw memory, over the gaps of a slice too.
    return _FACTORIES[name](params, lr, all(is_dense(tensor) for tensor in params))


@dataclass(frozen=True)
class MetaConfig:
    """The meta-hyperparameters of one trial: typed objects inside, flat keys at the edges.

    Attributes:
        inverse: The inverse-Hessian approximation, with its own settings.
        meta_lr: Learning rate of the hyperparameters λ, above 0.
        meta_optimizer: Their optimiser: one of `optimizers.OPTIMIZERS`.
        inner_steps: T, weight updates per outer step, at least 1.
        inner_lr: Learning rate of the weights, above 0.
        inner_optimizer: Their optimiser.
        warm_start: Start each linear solve from the last one's solution, at one product more
            (Dagréou et al. 2022). Needs an inverse that refines: not `Identity`, not `Nystrom`.
        curvature: ``"hessian"``, or ``"gauss_newton"``, which has no negative curvature.
        start_check: Whether second derivatives are held against finite differences, and the losses
            repeated, in the first outer step; see `StartCheck`.

    Raises:
        UsageError: If a value is out of range, or the inverse has a field that is named like one of
            these.

    Example:
        >>> from ift_tune import ConjugateGradient, MetaConfig
        >>> config = MetaConfig(inverse=ConjugateGradient(max_steps=8), inner_steps=10)
        >>> flat = config.to_flat()
        >>> flat["inverse"], flat["max_steps"], flat["inner_steps"]
        ('conjugate_gradient', 8, 10)
        >>> MetaConfig.from_flat(flat) == config
        True
        >>> config.updated({"inverse": "neumann", "terms": 3}).inverse.terms
        3
    """

    inverse: Inverse = field(default_factory=Neumann)
    meta_lr: float = 0.01
    meta_optimizer: str = "adam"
    inner_steps: int = 20
    inner_lr: float = 1e-3
    inner_optimizer: str = "adam"
    warm_start: bool = False
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    start_check: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.inverse, Inverse):
            raise UsageError(f"inverse must be an object such as Neumann(), got {self.inverse!r}")
        take_plain(self)
        refuse_shared_names(self, self.inverse)
        require_number("meta_lr", self.meta_lr, above=0.0)
        require_number("inner_lr", self.inner_lr, above=0.0)
        require_integer("inner_steps", self.inner_steps, 1)
        check_optimizer("meta_optimizer", self.meta_optimizer)
        check_optimizer("inner_optimizer", self.inner_optimizer)
        for name in ("warm_start", "start_check"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, got {value!r}")
        if self.warm_start and not self.inverse.refines:
            able = [name for name, kind in INVERSES.items() if kind.refines]
            raise UsageError(
                f"warm_start refines the last solution, which {self.inverse.name} cannot: "
                f"use {', '.join(able[:-1])} or {able[-1]}"
            )
        if self.curvature not in ("hessian", "gauss_newton"):
            raise UsageError(
                f"curvature must be 'hessian' or 'gauss_newton', got {self.curvature!r}"
            )

    def to_flat(self) -> Flat:
        """Return plain values by key, for tables and search spaces; unset settings are left out.

        So is a start check that is made: it decides no number, and runs of before there was one
        keep their identity.
        """
        own = {name: getattr(self, name) for name in _own_keys() if name != "inverse"}
        if self.start_check:
            del own["start_check"]
        return {"inverse": self.inverse.name, **flatten_choice(self.inverse), **own}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> MetaConfig:
        """Build from plain values; a missing key has its default, None and NaN count as missing.

        Raises:
            UsageError: If a key is unknown (the nearest right one is named), belongs to another
                inverse, or a value is out of range.
        """
        require_instance("a flat configuration", flat, Mapping, 'a mapping such as {"terms": 3}')
        given = plain(flat)
        inverse = find_kind("inverse", given.get("inverse", Neumann.name))
        chosen = {"inverse": inverse}
        for name in CHOICES.keys() & names(inverse):
            chosen[name] = find_kind(name, given.get(name, NoPreconditioner.name))
        refuse_strangers(given, cls, chosen)
        own = {k: given[k] for k in _own_keys() if k in given and k != "inverse"}
        return cls(inverse=build_choice(INVERSES[inverse.name], given), **typed(cls, own))

    def updated(self, changes: Mapping[str, Any]) -> MetaConfig:
        """Return a copy with some flat keys changed.

        Another inverse, or preconditioner, starts from its own defaults. Of settings that exclude
        each other, as Neumann's `alpha` and `alpha_scale`, a change of one drops the other.
        """
        require_instance("changes", changes, Mapping, 'a mapping such as {"terms": 3}')
        changes = plain(changes)
        dropped: set[str] = set()
        for name, choice in choices_of(self.inverse).items():
            if changes.get(name, choice.name) != choice.name:
                dropped |= flatten_choice(choice).keys()
        for group in self.inverse.alternatives:
            if not changes.keys().isdisjoint(group):
                dropped |= set(group)
        kept = {key: value for key, value in self.to_flat().items() if key not in dropped}
        return MetaConfig.from_flat(kept | changes)

    @staticmethod
    def applies(key: str, point: Mapping[str, Any]) -> bool:
        """Return whether a flat key means anything beside the choices that `point` names."""
        for name, kinds in CHOICES.items():
            if any(key in names(kind) for kind in kinds.values()):
                kind = kinds.get(str(point.get(name)))
                return (kind is None or key in names(kind)) and MetaConfig.applies(name, point)
        return True

    @staticmethod
    def integer_keys() -> set[str]:
        """Return the flat keys whose values are whole numbers."""
        kinds = (MetaConfig, *(kind for kinds in CHOICES.values() for kind in kinds.values()))
        return {key for kind in kinds for key, hint in get_type_hints(kind).items() if hint is int}

    @staticmethod
    def flat_keys() -> list[str]:
        """Return every key a flat configuration can have, whatever its inverse."""
        kinds = [kind for kinds in CHOICES.values() for kind in kinds.values()]
        theirs = [item.name for kind in kinds for item in fields(kind)]
        return list(dict.fromkeys(["inverse", *theirs, *_own_keys()]))


def _own_keys() -> list[str]:
    return [item.name for item in fields(MetaConfig)]
