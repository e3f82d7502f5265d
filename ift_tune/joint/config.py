"""What the outer search tunes: the meta-hyperparameters of one trial, as an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from ift_tune.base.arguments import known_keywords, require_instance, take_plain
from ift_tune.base.arguments import plain as as_plain
from ift_tune.base.errors import UsageError, require_integer, require_number
from ift_tune.implicit.inverse import INVERSES, Inverse, Neumann
from ift_tune.implicit.preconditioner import NoPreconditioner
from ift_tune.joint.budget import Budget as Budget  # this was its home once
from ift_tune.joint.flat import (
    CHOICES,
    USER,
    Flat,
    UserSettings,
    build_choice,
    check_user,
    choices_of,
    find_kind,
    flatten_choice,
    names,
    plain,
    refuse_shared_names,
    refuse_strangers,
    typed,
    user_settings,
)
from ift_tune.joint.memory import parse_bytes
from ift_tune.joint.optimizers import (
    OPTIMIZERS as OPTIMIZERS,
)
from ift_tune.joint.optimizers import (
    PRECISIONS,
    SCHEDULES,
    momentum_options,
    optimizer_name,
)

PRODUCTS = ("exact", "difference")
NEVER_ANEW: Flat = {"reinit_every": 0, "reinit_below": 0.0}
"""Changes of a configuration, for whoever looks at a few steps of weights as they are."""

_LATER = (
    *("inner_schedule", "inner_warmup", "accumulate", "precision"),
    "start_check",  # it decides no number
    *("products", "memory_budget"),
    *("reinit_every", "reinit_below"),
    *("signal_every", "signal_parts", "signal_patience"),
)


def _part_of(name: str) -> str | None:
    """Return what to write for a setting that is one of a part's: of an inverse, say."""
    for key, kinds in CHOICES.items():
        for kind in kinds.values():
            if name in {item.name for item in fields(kind)}:
                return f": it is one of the {key}: write {key}={kind.__name__}({name}=...)"
    return None


@known_keywords(_part_of)
@dataclass(frozen=True)
class MetaConfig:
    """The meta-hyperparameters of one trial: typed objects inside, flat keys at the edges.

    Attributes:
        inverse: The inverse-Hessian approximation, with its own settings.
        meta_lr: Learning rate of the hyperparameters λ, above 0.
        meta_optimizer: Their optimiser: one of `optimizers.OPTIMIZERS`, which are those of
            `torch.optim` by their names in lower case, and ``"momentum"``.
        inner_steps: T, weight updates per outer step, at least 1.
        inner_lr: Learning rate of the weights, above 0.
        inner_optimizer: Their optimiser. A problem may bring its own, see
            `BilevelProblem.configure_inner`.
        inner_momentum: Its momentum, Adam's β₁; None for its usual one.
        inner_schedule: ``"constant"``, or ``"cosine"`` or ``"linear"`` from `inner_lr` to 0 over
            the whole training.
        inner_warmup: Inner steps over which the learning rate grows to `inner_lr`.
        clip_norm: The largest norm of an inner step's gradient, all weights together, the
            penalty's included; None for none.
        accumulate: Training batches whose mean gradient an inner step takes.
        precision: Of the training loss in inner steps: ``"bfloat16"`` by autocast. The outer step
            has the precision of the weights.
        user: Settings of the user's own by name, numbers and words: flat, ``user.NAME``. The
            problem factory finds them here, the tables have a column for each.
        warm_start: Start each linear solve from the last one's solution, at one product more
            (Dagréou et al. 2022). Needs an inverse that refines: not `Identity`, not `Nystrom`.
        curvature: ``"hessian"``, or ``"gauss_newton"``, which has no negative curvature.
        products: ``"exact"``, or ``"difference"``: products with second derivatives by central
            differences of gradients, on the kernels of training and in its memory, whatever has no
            second derivative (compiled models, fused attention, reentrant checkpoints).
        memory_budget: Bytes that a trial's tensors may take, or a text such as ``"2GB"``: outer
            steps take their batches in micro-batches that keep to it, with the same numbers. None
            for whole batches, unless memory runs out.
        reinit_every: Outer steps after which the weights begin anew, and so do the buffers, the
            inner optimiser and its schedule, while λ and its optimiser go on; 0 for never. Against
            the memory of weights that are kept (Vicol et al. 2022): λ then suits trainings of
            ``reinit_every * inner_steps`` steps. The new weights are those of the problem's factory
            at another seed.
        reinit_below: They begin anew as well once the training loss of an outer step is below this
            share of what it was before their first step; 0 for never.
        signal_every: Outer steps between measurements of how far the hypergradient stands out of
            its noise (`hypergradient_signal`), each at the cost of `signal_parts` solves; 0 for
            never. λ is the same with and without.
        signal_parts: The parts of the validation batch that are compared for it, at least 2: more
            of them tell the noise of a few hyperparameters better, and for many two are enough.
        signal_patience: Measurements in a row with more noise than signal after which a trial ends:
            early stopping that needs no further split; 0 for never.
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
        >>> config.updated({"user.width": 64}).user["width"]
        64
    """

    inverse: Inverse = field(default_factory=Neumann)
    meta_lr: float = 0.01
    meta_optimizer: str = "adam"
    inner_steps: int = 20
    inner_lr: float = 1e-3
    inner_optimizer: str = "adam"
    inner_momentum: float | None = None
    inner_schedule: Literal["constant", "cosine", "linear"] = "constant"
    inner_warmup: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    warm_start: bool = False
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    start_check: bool = True
    products: Literal["exact", "difference"] = "exact"
    memory_budget: int | str | None = None
    reinit_every: int = 0
    reinit_below: float = 0.0
    signal_every: int = 0
    signal_parts: int = 4
    signal_patience: int = 0
    user: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inverse, Inverse):
            raise UsageError(f"inverse must be an object such as Neumann(), got {self.inverse!r}")
        take_plain(self)
        refuse_shared_names(self, self.inverse)
        require_number("meta_lr", self.meta_lr, above=0.0)
        require_number("inner_lr", self.inner_lr, above=0.0)
        require_integer("inner_steps", self.inner_steps, 1)
        for role in ("meta_optimizer", "inner_optimizer"):  # one spelling, so that equal is equal
            object.__setattr__(self, role, optimizer_name(role, getattr(self, role)))
        self._check_training()
        require_instance("user", self.user, Mapping, "settings by name")
        user = UserSettings({name: as_plain(value) for name, value in self.user.items()})
        check_user(user)
        object.__setattr__(self, "user", user)  # nobody else's to change
        for name in ("warm_start", "start_check"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, got {value!r}")
        if self.products not in PRODUCTS:
            raise UsageError(f"products must be 'exact' or 'difference', got {self.products!r}")
        if self.memory_budget is not None:
            bytes_ = parse_bytes("memory_budget", self.memory_budget)
            object.__setattr__(self, "memory_budget", bytes_)
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

    def _check_training(self) -> None:
        if self.inner_momentum is not None:
            require_number("inner_momentum", self.inner_momentum, least=0.0)
            if self.inner_momentum >= 1.0:
                raise UsageError(f"inner_momentum must be below 1, got {self.inner_momentum!r}")
            momentum_options(self.inner_optimizer, self.inner_momentum)
        for name, words in (("inner_schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in words:
                raise UsageError(
                    f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}"
                )
        require_integer("inner_warmup", self.inner_warmup, 0)
        require_integer("accumulate", self.accumulate, 1)
        if self.clip_norm is not None:
            require_number("clip_norm", self.clip_norm, above=0.0)
        require_integer("signal_every", self.signal_every, 0)
        require_integer("signal_parts", self.signal_parts, 2)
        require_integer("signal_patience", self.signal_patience, 0)
        if self.signal_patience and not self.signal_every:
            raise UsageError(
                "signal_patience counts measurements of the signal: set signal_every too, such as "
                f"to 5, got signal_patience={self.signal_patience} and signal_every=0"
            )
        require_integer("reinit_every", self.reinit_every, 0)
        require_number("reinit_below", self.reinit_below, least=0.0)
        if self.reinit_below >= 1.0:
            raise UsageError(
                "reinit_below is a share of the training loss that weights begin with, and must be "
                f"below 1, got {self.reinit_below!r}"
            )

    def to_flat(self) -> Flat:
        """Return plain values by key, for tables and search spaces; unset settings are left out.

        So are those of `_LATER` at their defaults: runs of before they were there keep their
        identity.
        """
        own: Flat = {}
        for item in fields(self):
            value = getattr(self, item.name)
            unset = value is None or (item.name in _LATER and value == item.default)
            if item.name in _own_keys() and item.name != "inverse" and not unset:
                own[item.name] = value
        own |= {f"{USER}{name}": value for name, value in self.user.items()}
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
        user = user_settings(given)
        given = {key: value for key, value in given.items() if not key.startswith(USER)}
        inverse = find_kind("inverse", given.get("inverse", Neumann.name))
        chosen = {"inverse": inverse}
        for name in CHOICES.keys() & names(inverse):
            chosen[name] = find_kind(name, given.get(name, NoPreconditioner.name))
        refuse_strangers(given, cls, chosen)
        own = {k: given[k] for k in _own_keys() if k in given and k != "inverse"}
        made = build_choice(INVERSES[inverse.name], given)
        return cls(inverse=made, user=user, **typed(cls, own))

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
    def is_key(key: str) -> bool:
        """Return whether a flat configuration can have a key: ``user.NAME`` with any name."""
        return key in MetaConfig.flat_keys() or (
            key.startswith(USER) and key.removeprefix(USER).isidentifier()
        )

    @staticmethod
    def integer_keys() -> set[str]:
        """Return the flat keys whose values are whole numbers."""
        kinds = (MetaConfig, *_kinds())
        return {key for kind in kinds for key, hint in get_type_hints(kind).items() if hint is int}

    @staticmethod
    def flat_keys() -> list[str]:
        """Return every key a flat configuration can have, whatever its inverse, but users' own."""
        theirs = [item.name for kind in _kinds() for item in fields(kind)]
        return list(dict.fromkeys(["inverse", *theirs, *_own_keys()]))


def _kinds() -> list[type]:
    """Return the classes of all objects with settings of their own."""
    return [kind for kinds in CHOICES.values() for kind in kinds.values()]


def _own_keys() -> list[str]:
    return [item.name for item in fields(MetaConfig) if item.name != "user"]
