"""A configuration of Ray's as a point of the space, whatever its searchers and schedulers add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.tune.search.repeater import TRIAL_INDEX

from ift_tune.base.arguments import plain, shown
from ift_tune.base.errors import UsageError, nearest
from ift_tune.joint.config import MetaConfig
from ift_tune.search.space import Choice, Space

NUMBER = "trial"
"""Key of a Ray configuration that is no meta-hyperparameter: the trial's number in the tables."""

_ADDED = "__"  # how the keys begin that Ray's own searchers add


class Point(NamedTuple):
    """What a configuration says.

    Attributes:
        values: Flat `MetaConfig` keys, inside the space.
        repeat: Which of several repeats of the same values it is, counted by Ray's ``Repeater``.
        moved: In words, each value that was outside the space, with what was taken for it.
    """

    values: dict[str, Any]
    repeat: int
    moved: list[str]


def point_of(config: Mapping[str, Any], space: Space | None, common: tuple[str, ...] = ()) -> Point:
    """Return the point of a configuration.

    Ray's samplers draw NumPy's numbers and whole floats, its population based training multiplies
    values without looking at the ranges, and its searchers add keys of their own.

    Args:
        config: Ray's.
        space: What varies.
        common: Keys that the trainable understands beside those of `MetaConfig`.

    Raises:
        UsageError: If a key is none of `MetaConfig`.
    """
    given = {k: plain(v) for k, v in config.items() if k != NUMBER and not k.startswith(_ADDED)}
    for key in given:
        if not MetaConfig.is_key(key):
            known = [*MetaConfig.flat_keys(), *common]
            raise UsageError(
                f"{key} is not a meta-hyperparameter{nearest(key, known)}; a key of your own in "
                "Ray's param_space or the searcher's space is written user.NAME, and reaches the "
                f"problem factory as config.user['NAME'], got {shown(key)}"
            )
    values = given if space is None else _inside(given, space)
    moved = [f"{k} {v!r} as {values[k]!r}" for k, v in given.items() if values[k] != v]
    return Point(values, int(config.get(TRIAL_INDEX, 0)), moved)


def _inside(values: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return the values with numbers moved to the nearest of the space."""
    found = dict(values)
    for key, d in space.distributions.items():
        value = values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
            continue
        if not isinstance(d, Choice):
            found[key] = d.nearest(value)
        elif value not in d.options:
            numbers = [o for o in d.options if isinstance(o, int | float) and type(o) is not bool]
            found[key] = min(numbers, key=lambda o: abs(o - value), default=value)
    return found
