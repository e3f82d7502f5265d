"""What the outer search tunes: an object inside, flat at the edges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_type_hints

from ift_tune.base.errors import UsageError, nearest, require_integer, require_number
from ift_tune.implicit.inverse import INVERSES, Inverse, Neumann
from ift_tune.joint.budget import Budget as Budget  # this was its home once
from ift_tune.joint.optimizers import check_optimizer

FlatValue: TypeAlias = bool | int | float | str | None


Flat: TypeAlias = dict[str, FlatValue]


@dataclass(frozen=True)
class MetaConfig:
    """The meta-hyperparameters of one trial.

    Attributes:
        inverse: The inverse-Hessian approximation, with its own settings.
        meta_lr: Learning rate of the hyperparameters λ.
        meta_optimizer: Their optimiser: one of `optimizers.OPTIMIZERS`.
        inner_steps: T, weight updates per outer step, at least 1.
        inner_lr: Learning rate of the weights.
        inner_optimizer: Their optimiser.
        warm_start: Start each linear solve from the last one's solution, at one product more
            (Dagréou et al. 2022). Needs an inverse that refines: not `Identity`, not `Nystrom`.
        curvature: ``"hessian"``, or ``"gauss_newton"``, which has no negative curvature.

    Raises:
        UsageError: If a value is out of range.
    """

    inverse: Inverse = field(default_factory=Neumann)
    meta_lr: float = 0.01
    meta_optimizer: str = "adam"
    inner_steps: int = 20
    inner_lr: float = 1e-3
    inner_optimizer: str = "adam"
    warm_start: bool = False
    curvature: Literal["hessian", "gauss_newton"] = "hessian"

    def __post_init__(self) -> None:
        if not isinstance(self.inverse, Inverse):
            raise UsageError(f"inverse must be an object such as Neumann(), got {self.inverse!r}")
        require_number("meta_lr", self.meta_lr, above=0.0)
        require_number("inner_lr", self.inner_lr, above=0.0)
        require_integer("inner_steps", self.inner_steps, 1)
        check_optimizer("meta_optimizer", self.meta_optimizer)
        check_optimizer("inner_optimizer", self.inner_optimizer)
        if not isinstance(self.warm_start, bool):
            raise UsageError(f"warm_start must be true or false, got {self.warm_start!r}")
        if self.warm_start and not self.inverse.refines:
            raise UsageError(
                f"warm_start refines the last solution, which {self.inverse.name} cannot: "
                "use neumann, conjugate_gradient or dense"
            )
        if self.curvature not in ("hessian", "gauss_newton"):
            raise UsageError(
                f"curvature must be 'hessian' or 'gauss_newton', got {self.curvature!r}"
            )

    def to_flat(self) -> Flat:
        """Return plain values by key; settings the inverse leaves unset are left out."""
        flat: Flat = {"inverse": self.inverse.name}
        for item in fields(self.inverse):
            value = getattr(self.inverse, item.name)
            if value is not None:
                flat[item.name] = value
        for item in fields(self):
            if item.name != "inverse":
                flat[item.name] = getattr(self, item.name)
        return flat

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> MetaConfig:
        """Build from plain values; a missing key has its default, None and NaN count as missing.

        Raises:
            UsageError: If a key is unknown (the nearest right one is named), belongs to another
                inverse, or a value is out of range.
        """
        given = {k: value for k, v in flat.items() if not _missing(value := _plain(v))}
        name = given.pop("inverse", Neumann.name)
        if name not in INVERSES:
            raise UsageError(f"unknown inverse {name!r}{nearest(str(name), INVERSES)}")
        kind = INVERSES[str(name)]
        own = [item.name for item in fields(cls) if item.name != "inverse"]
        theirs = [item.name for item in fields(kind)]
        for key in given:
            if key not in own and key not in theirs:
                owners = [n for n, k in INVERSES.items() if key in {f.name for f in fields(k)}]
                hint = (
                    f" belongs to the inverse {' or '.join(owners)}, not {name}: set inverse too"
                    if owners
                    else f" is not a meta-hyperparameter{nearest(key, [*own, *theirs, 'inverse'])}"
                )
                raise UsageError(f"{key}{hint}")
        inverse = kind(**_typed(kind, {k: v for k, v in given.items() if k in theirs}))
        return cls(inverse=inverse, **_typed(cls, {k: v for k, v in given.items() if k in own}))

    def updated(self, changes: Mapping[str, Any]) -> MetaConfig:
        """Return a copy with some flat keys changed.

        Another inverse starts from its own defaults, and of the two ways to set Neumann's step,
        `alpha` and `alpha_scale`, a change of one drops the other.
        """
        flat = self.to_flat()
        changes = {k: value for k, v in changes.items() if not _missing(value := _plain(v))}
        dropped: set[str] = set()
        if changes.get("inverse", self.inverse.name) != self.inverse.name:
            dropped = {item.name for item in fields(self.inverse)}
        elif "alpha" in changes:
            dropped = {"alpha_scale"}
        elif "alpha_scale" in changes:
            dropped = {"alpha"}
        return MetaConfig.from_flat(
            {key: value for key, value in flat.items() if key not in dropped} | changes
        )

    @staticmethod
    def integer_keys() -> set[str]:
        """Return the flat keys whose values are whole numbers."""
        kinds = (MetaConfig, *INVERSES.values())
        return {key for kind in kinds for key, hint in get_type_hints(kind).items() if hint is int}

    @staticmethod
    def flat_keys() -> list[str]:
        """Return every key a flat configuration can have, whatever its inverse."""
        own = [item.name for item in fields(MetaConfig)]
        theirs = [item.name for kind in INVERSES.values() for item in fields(kind)]
        return list(dict.fromkeys([own[0], *theirs, *own[1:]]))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """Turn a NumPy scalar, as a table gives it, into the Python number."""
    return value.item() if hasattr(value, "item") else value


def _typed(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Turn whole floats into integers where the field is one (table columns with gaps)."""
    hints = get_type_hints(kind)
    return {
        key: int(value)
        if hints[key] is int and isinstance(value, float) and value.is_integer()
        else value
        for key, value in values.items()
    }
