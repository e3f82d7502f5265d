"""Objects with settings and their flat form: one plain value by each name, as tables need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias, TypeVar, get_type_hints

from ift_tune.base.arguments import plain as as_plain
from ift_tune.base.errors import MissingSettingError, UsageError, nearest
from ift_tune.implicit.inverse import INVERSES, Inverse
from ift_tune.implicit.preconditioner import PRECONDITIONERS, NoPreconditioner, Preconditioner

FlatValue: TypeAlias = bool | int | float | str | None

Flat: TypeAlias = dict[str, FlatValue]

Choice: TypeAlias = Inverse | Preconditioner

ChoiceT = TypeVar("ChoiceT", bound=Choice)

CHOICES: Mapping[str, Mapping[str, type[Choice]]] = {
    "inverse": INVERSES,
    "preconditioner": PRECONDITIONERS,
}
"""The fields that hold an object with settings of its own, each inside the one before. Flat, the
field's name has the object's name, and the settings stand beside it."""


USER = "user."
"""How the flat keys of a user's own settings begin."""


class UserSettings(dict[str, Any]):
    """Settings of the user's own, which say how to give one that is missing."""

    def __missing__(self, name: str) -> Any:
        """Refuse to guess a setting that a factory asks for.

        Raises:
            MissingSettingError: Always.
        """
        given = f"got {', '.join(f'{USER}{key}' for key in self) or 'none of your own'}"
        raise MissingSettingError(
            f"the problem asks for config.user[{name!r}]: give it by --set {USER}{name}=VALUE or "
            f'MetaConfig(user={{"{name}": ...}}), or vary it in the space, {given}'
        )


def user_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's own settings among flat values, by their names without the prefix.

    Raises:
        UsageError: If a name is none, or a value is not plain.
    """
    found = {key.removeprefix(USER): v for key, v in flat.items() if key.startswith(USER)}
    check_user(found)
    return found


def check_user(settings: Mapping[str, Any]) -> None:
    """Raise a `UsageError` unless these are names with plain values, as tables can hold them."""
    for name, value in settings.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"a setting of your own must be named like a variable, got {name!r}")
        if not isinstance(value, bool | int | float | str):
            raise UsageError(
                f"user.{name} must be a number, a word, true or false, got {value!r}: give what "
                "cannot be told so by a name that the problem factory looks up"
            )


def names(kind: type) -> set[str]:
    """Return the names of a dataclass's fields."""
    return {item.name for item in fields(kind)}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are there, without None and NaN, as Python numbers and words."""
    found = {k: as_plain(v) for k, v in values.items()}
    return {k: v for k, v in found.items() if v is not None and not _is_nan(v)}


def flatten_choice(choice: Choice) -> Flat:
    """Return the settings of an object by name, without those unset and without an M of I."""
    flat: Flat = {}
    for item in fields(choice):
        value = getattr(choice, item.name)
        if isinstance(value, Preconditioner):
            if not isinstance(value, NoPreconditioner):
                flat |= {item.name: value.name, **flatten_choice(value)}
        elif value is not None:
            flat[item.name] = value
    return flat


def build_choice(kind: type[ChoiceT], flat: Mapping[str, Any]) -> ChoiceT:
    """Return an object with those of the flat values that are its settings.

    Raises:
        UsageError: If one is out of range.
    """
    own = {k: v for k, v in flat.items() if k in names(kind)}
    inside = {k: build_choice(find_kind(k, own[k]), flat) for k in own if k in CHOICES}
    return kind(**typed(kind, own | inside))


def find_kind(choice: str, name: object) -> type[Choice]:
    """Return the class that a flat value names.

    Raises:
        UsageError: If there is none; the nearest name is given.
    """
    kinds = CHOICES[choice]
    if not isinstance(name, str) or name not in kinds:
        raise UsageError(f"unknown {choice} {name!r}{nearest(str(name), kinds)}")
    return kinds[name]


def choices_of(inverse: Inverse) -> dict[str, Choice]:
    """Return an inverse and what it holds, by the names of the fields that hold them."""
    found: dict[str, Choice] = {"inverse": inverse}
    for name in CHOICES:
        if isinstance(value := getattr(inverse, name, None), Preconditioner):
            found[name] = value
    return found


def typed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn whole floats into integers where the field is one (table columns with gaps)."""
    hints = get_type_hints(kind)
    return {
        key: int(value)
        if hints[key] is int and isinstance(value, float) and value.is_integer()
        else value
        for key, value in values.items()
    }


def refuse_shared_names(config: object, inverse: Inverse) -> None:
    """Refuse an object whose field has the name of another's: flat, the two would be one value.

    Raises:
        UsageError: If there is one.
    """
    taken: dict[str, str] = {}
    for owner in (config, *choices_of(inverse).values()):
        own = type(owner).__name__
        for name in sorted(names(type(owner))):
            if name in taken:
                raise UsageError(
                    f"{own} and {taken[name]} both have a field {name!r}, which a flat "
                    f"configuration could not tell apart: rename the one of {own}"
                )
            taken[name] = own


def refuse_strangers(
    flat: Mapping[str, Any], config: type, chosen: Mapping[str, type[Choice]]
) -> None:
    """Refuse keys that neither a configuration nor what is chosen for it has.

    Raises:
        UsageError: If there is one; it says where the key belongs, or names the nearest right one.
    """
    known = names(config).union(*(names(kind) for kind in chosen.values()))
    for key in flat:
        if key in known:
            continue
        for name, kinds in CHOICES.items():
            owners = [n for n, kind in kinds.items() if key in names(kind)]
            if owners:
                other = chosen[name].name if name in chosen else NoPreconditioner.name
                raise UsageError(
                    f"{key} belongs to the {name} {' or '.join(owners)}, not {other}: set {name} "
                    "too"
                )
        raise UsageError(f"{key} is not a meta-hyperparameter{nearest(key, known)}")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
